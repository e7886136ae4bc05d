"""What a run remembers: values, no behaviour."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fedlpp_ray.messages import Transfer, total_bytes
from fedlpp_ray.tasks import Metrics

Memory = bytes | None
"""A client's own tensors between its rounds, as safetensors bytes. Held for it by the federation,
because hosts serve many clients; no message carries it."""


@dataclass(frozen=True)
class Assignment:
    """One client's part in a round of the server's.

    Attributes:
        client: Which client.
        started: The round whose broadcast it trains from: the current one, or where the server
            does not wait for its clients, possibly an earlier one.
        weight: Discount of an update that is late, in [1e-6, 1]; multiplies its weight in the mean.
    """

    client: int
    started: int
    weight: float = 1.0


@dataclass(frozen=True)
class ClientUpdate:
    """What one client returns from one round.

    Attributes:
        client: Which client.
        payload: The encoded update a_i - D.
        loss: Mean training loss, nats.
        seconds: Time the client computed, decoding and encoding included.
        host: Which host it ran on.
        memory: What the client keeps until it takes part again, or None. It does not travel.
    """

    client: int
    payload: bytes
    loss: float
    seconds: float
    host: int
    memory: Memory = None


@dataclass(frozen=True)
class Evaluation:
    """The server's state S and what clients have of it, measured three ways on held-out data.

    Attributes:
        server: Full-precision base and S; None where `evaluation.server` is false.
        client_before: What a client trains from in the next round: its base and the D in force,
            deq(quant(S)), or that of an earlier S where `downlink.every` makes no new one.
        client_after: The same after the local training of the strongest client.

    A run that is no federation has one of them: `server` if centralised, else `client_after`.
    """

    server: Metrics | None
    client_before: Metrics | None
    client_after: Metrics | None


@dataclass(frozen=True)
class Floor:
    """What the strongest client has without taking part.

    Where clients have an emulator (`emulator.kind`) it is measured in that, with the same kind of
    adapter: more than a client without the federation would have, where W0 is not public, and less
    where it is.

    Attributes:
        base: The client's base with no adapter (and an untrained head).
        local_only: LoRA trained on that client's data alone, as many steps as in all rounds.
        client: Which client.
        examples: How many examples it has.
    """

    base: Metrics
    local_only: Metrics
    client: int
    examples: int


@dataclass(frozen=True)
class RoundRecord:
    """One finished round.

    Attributes:
        round: From 1.
        evaluation: Of the state after this round, or None where it was not evaluated.
        ledger: Bytes of each client of the cohort; 0 down for one that held the broadcast.
        loss: Mean training loss of each client of the cohort, nats.
        seconds: Wall time by phase: broadcast, train, aggregate, evaluate, total. Within train,
            `client_compute` is that of the busiest actor and `communication` the rest.
        digest: SHA-256 of the state after this round.
    """

    round: int
    evaluation: Evaluation | None
    ledger: tuple[Transfer, ...]
    loss: tuple[float, ...]
    seconds: dict[str, float]
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a result file."""
        clients = zip(self.ledger, self.loss, strict=True)
        return {
            "round": self.round,
            **(asdict(self.evaluation) if self.evaluation else dict.fromkeys(EVALUATED)),
            "bytes": total_bytes(self.ledger),
            "seconds": self.seconds,
            "clients": [asdict(transfer) | {"loss": loss} for transfer, loss in clients],
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoundRecord:
        """The inverse of `to_dict`."""
        clients = values["clients"]
        evaluated = any(values[key] is not None for key in EVALUATED)
        return cls(
            round=values["round"],
            evaluation=Evaluation(**{key: values[key] for key in EVALUATED}) if evaluated else None,
            ledger=tuple(Transfer(c["client"], c["down"], c["up"]) for c in clients),
            loss=tuple(client["loss"] for client in clients),
            seconds=values["seconds"],
            digest=values["digest"],
        )


EVALUATED = ("server", "client_before", "client_after")
"""The models of an evaluation, as `Evaluation` names them."""
