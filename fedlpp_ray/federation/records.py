"""What a run remembers: values, no behaviour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fedlpp_ray.messages import Transfer, total_bytes
from fedlpp_ray.privacy.secure import SecureClient
from fedlpp_ray.tasks import Metrics

Memory = bytes | None
"""A client's own tensors between its rounds, as safetensors bytes. Held for it by the federation,
because hosts serve many clients; no message carries it."""


SMALLEST_DISCOUNT = 1e-6
"""However late an update is."""


@dataclass(frozen=True)
class Assignment:
    """One client's part in a round.

    Attributes:
        client: Which client.
        started: The round whose broadcast it trains from: this one, or of fedbuff an earlier one.
        discount: What its update is multiplied by, for staleness: `SMALLEST_DISCOUNT` to 1.
    """

    client: int
    started: int
    discount: float = 1.0


@dataclass(frozen=True)
class ClientUpdate:
    """What one client returns from one round.

    Attributes:
        client: Which client.
        payload: The encoded update a_i - D, or with secure aggregation the masked one.
        loss: Mean training loss, nats.
        seconds: Time the client computed, decoding and encoding included.
        host: Which host it ran on.
        memory: What the client keeps until it takes part again, or None. It does not travel.
        half: With secure aggregation the client's half, which has masked the update; nor does that.
    """

    client: int
    payload: bytes
    loss: float
    seconds: float
    host: int
    memory: Memory = None
    half: SecureClient | None = None


@dataclass(frozen=True)
class Fault:
    """Why a sampled client has no part in the server's next state.

    Attributes:
        kind: `late`: it was not done in time. `dropped`: it never returned, in the simulation.
            `failed`: its actor or node was lost in every attempt. `refused`: its update, or the
            broadcast at the client, was not what was expected. `abandoned`: too few others came, or
            secure aggregation gave no sum of those.
        reason: In words.
    """

    kind: Literal["late", "dropped", "failed", "refused", "abandoned"]
    reason: str


FAULTS = ("late", "dropped", "failed", "refused", "abandoned")
"""The kinds of `Fault`."""


@dataclass(frozen=True)
class ClientReport:
    """What the federation hears of a client's round; the update itself is at the server.

    Attributes:
        client: Which client.
        up: Bytes of its update.
        loss: Mean training loss, nats; None where it returned none.
        seconds: Time it computed.
        host: Which host it ran on.
        memory: What it keeps until it takes part again.
        half: With secure aggregation the client's half, which has masked the update.
        fault: Why its update was not folded, or None.
    """

    client: int
    up: int = 0
    loss: float | None = None
    seconds: float = 0.0
    host: int = 0
    memory: Memory = None
    half: SecureClient | None = None
    fault: Fault | None = None


@dataclass(frozen=True)
class Evaluation:
    """The server's state S and what clients have of it, measured three ways on held-out data.

    Attributes:
        server: Full-precision base and S; None where `evaluation.server` is false.
        client_before: What a client trains from in the next round: its base and the D in force,
            deq(quant(S)), or that of an earlier S where `downlink.every` makes no new one.
        client_after: The same after the local training of the strongest client.
        leak: In the same base what attacks on the newest broadcasts came to (`adversary.watch`), by
            their names, in the rounds in which they were measured.

    A run that is no federation has one of them: `server` if centralised, else `client_after`.
    """

    server: Metrics | None
    client_before: Metrics | None
    client_after: Metrics | None
    leak: Mapping[str, Metrics] = field(default_factory=dict)


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
class Final:
    """The server's final model, made after the last round; no client receives anything of it.

    Attributes:
        server: Metrics, on the server's base; None where `evaluation.server` is false.
        digest: SHA-256 of its state.
        adapter: The state as the files of a PEFT adapter, and what an adapter cannot hold.
    """

    server: Metrics | None
    digest: str
    adapter: Mapping[str, bytes]

    def to_dict(self) -> dict[str, Any]:
        """What a result file has of it, named as in a round's record."""
        return {"server": self.server, "digest": self.digest}


def report(update: ClientUpdate) -> ClientReport:
    """Of an update, without the update."""
    return ClientReport(
        update.client,
        len(update.payload),
        update.loss,
        update.seconds,
        update.host,
        update.memory,
        update.half,
    )


def refused(report: ClientReport, reason: str) -> ClientReport:
    """The same of an update that the server has refused."""
    return replace(report, fault=Fault("refused", reason))


@dataclass(frozen=True)
class Measured:
    """An evaluation, if one was due.

    Attributes:
        evaluation: It.
        seconds: That a client's host worked for it.
        leak: Of these, for `Evaluation.leak`.
    """

    evaluation: Evaluation | None
    seconds: float = 0.0
    leak: float = 0.0


Pending = Callable[[], Measured]
"""An evaluation that goes on elsewhere; called, it waits for it."""


@dataclass(frozen=True)
class ClientRecord:
    """One sampled client in one round.

    Attributes:
        client: Which client.
        down: Bytes that it downloaded, without the broadcast where it held that.
        up: Bytes of the update that it returned, and of what else secure aggregation has it send.
        loss: Mean training loss, nats; None where it returned none.
        staleness: Rounds closed between its start and its return; 0 in synchronous rounds.
        fault: Why its update was not folded, or None.
    """

    client: int
    down: int
    up: int
    loss: float | None
    staleness: int = 0
    fault: Fault | None = None


@dataclass(frozen=True)
class Spent:
    """What the rounds up to one have cost of the clients' privacy (`privacy.dp.epsilon_of`).

    Attributes:
        epsilon: After this round, with this delta; infinite without noise.
        delta: `dp.delta`.
        clip: C in force in this round.
        below: The noised fraction of clients whose update was within C, where the clip adapts and
            the round was not abandoned.
    """

    epsilon: float
    delta: float
    clip: float
    below: float | None = None


@dataclass(frozen=True)
class RoundRecord:
    """One finished round.

    Attributes:
        round: From 1.
        evaluation: Of the state after this round, or None where it was not evaluated.
        clients: Each that was sampled, by number.
        seconds: Wall time from one round's end to the next, by what was waited for: broadcast,
            train, aggregate, evaluate, record (the caller: checkpoint, log), and the total. A round
            is evaluated while the next one trains. `client_compute` is the work of the busiest
            host; `overhead` what it and the evaluation at a host leave of the total. `leak`: what
            of that evaluation was for `adversary.watch`. `simulated`: on the clock of `simulation`.
        digest: SHA-256 of the state after this round.
        privacy: With differential privacy, what has been spent.
    """

    round: int
    evaluation: Evaluation | None
    clients: tuple[ClientRecord, ...]
    seconds: dict[str, float]
    digest: str
    privacy: Spent | None = None

    @property
    def ledger(self) -> tuple[Transfer, ...]:
        """Bytes of each client that was sampled."""
        return tuple(Transfer(c.client, c.down, c.up) for c in self.clients)

    @property
    def folded(self) -> tuple[ClientRecord, ...]:
        """The clients whose updates made the state."""
        return tuple(client for client in self.clients if client.fault is None)

    @property
    def loss(self) -> tuple[float, ...]:
        """Mean training loss of each client whose update was folded, nats."""
        return tuple(math.nan if c.loss is None else c.loss for c in self.folded)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a result file."""
        return {
            "round": self.round,
            **(asdict(self.evaluation or Evaluation(None, None, None))),
            "bytes": total_bytes(self.ledger),
            "seconds": self.seconds,
            "clients": [asdict(client) for client in self.clients],
            "digest": self.digest,
            "privacy": asdict(self.privacy) if self.privacy else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoundRecord:
        """The inverse of `to_dict`."""
        models = values["server"], values["client_before"], values["client_after"]
        evaluated = any(model is not None for model in models)
        return cls(
            round=values["round"],
            evaluation=Evaluation(*models, leak=values.get("leak", {})) if evaluated else None,
            clients=tuple(map(_client, values["clients"])),
            seconds=values["seconds"],
            digest=values["digest"],
            privacy=Spent(**values["privacy"]) if values.get("privacy") else None,
        )


def _client(values: dict[str, Any]) -> ClientRecord:
    fault = values["fault"]
    return ClientRecord(**values | {"fault": Fault(**fault) if fault else None})


EVALUATED = ("server", "client_before", "client_after")
"""The models of an evaluation, as `Evaluation` names them."""
