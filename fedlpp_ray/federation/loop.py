"""The federation: rounds of FedLPP (Zhu et al., 2024), each in five steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import ClientUpdate, Evaluation, Floor, Memory, RoundRecord
from fedlpp_ray.federation.sampling import sample_cohort, strongest_client
from fedlpp_ray.federation.wire import Broadcast, edition
from fedlpp_ray.messages import Transfer


class Backend(Protocol):
    """The server and its clients, wherever they run: in this process, or in Ray actors."""

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""

    def download(self) -> int:
        """Bytes that a client downloads once, before its first round: an emulator of the model."""

    def encode_broadcast(self, round: int, clients: Sequence[int]) -> Broadcast:
        """The server's quantized state, made in a round, in the editions that clients read."""

    def train(
        self, round: int, cohort: Mapping[int, Memory], broadcast: Broadcast
    ) -> list[ClientUpdate]:
        """One update from each client of the cohort, in its order, given what each has kept."""

    def aggregate(self, round: int, broadcast: Broadcast, updates: Sequence[ClientUpdate]) -> str:
        """Fold the updates into the server's next state; returns its digest."""

    def evaluate(self, round: int, broadcast: Broadcast, memory: Memory) -> Evaluation:
        """The server's state and what the strongest client has of it.

        Given the broadcast in force in the round that follows, and what the client has kept.
        """

    def measure_floor(self) -> Floor:
        """What a client has without taking part."""

    def adapter(self) -> dict[str, bytes]:
        """The server's state as the files of a PEFT adapter."""

    def restore(self, adapter: dict[str, bytes]) -> str:
        """Take back the state of an `adapter`; returns its digest."""


class Federation:
    """One federated run.

    Args:
        experiment: What to run.
        backend: The parties.

    Attributes:
        history: The finished rounds. A run that starts with a history continues after it.
        broadcast: The broadcast in force.
        memories: What each client that has taken part keeps, where the method has it keep any.
    """

    def __init__(self, experiment: Experiment, backend: Backend) -> None:
        self.experiment = experiment
        self.backend = backend
        self.history: list[RoundRecord] = []
        self.broadcast: Broadcast = {}
        self.memories: dict[int, bytes] = {}
        self._examples = backend.examples()
        self._download = backend.download()
        self._strongest = strongest_client(experiment.lora, self._examples)

    def run(self) -> Iterator[RoundRecord]:
        """The rounds that remain, each yielded as it ends."""
        for round in range(len(self.history) + 1, self.experiment.federation.rounds + 1):
            self.history.append(self.run_round(round))
            yield self.history[-1]

    def run_round(self, round: int) -> RoundRecord:
        """One round, in five steps."""
        clock = _Clock()
        # 1. Sample the cohort.
        config, seed = self.experiment.federation, self.experiment.seed
        cohort = sample_cohort(config, seed, round, self._examples)
        # 2. The server encodes the broadcast once, or leaves the last one in force.
        with clock("broadcast"):
            self.broadcast = self._in_force(round, cohort)
        # 3. Each sampled client trains from it and returns one encoded update.
        with clock("train"):
            kept = {client: self.memories.get(client) for client in cohort}
            updates = self.backend.train(round, kept, self.broadcast)
            self.memories |= {u.client: u.memory for u in updates if u.memory is not None}
        # 4. The server folds the updates, in the cohort's order, into a new state.
        with clock("aggregate"):
            digest = self.backend.aggregate(round, self.broadcast, updates)
        # 5. Evaluate and record.
        with clock("evaluate"):
            evaluation = self._evaluate(round) if self._is_evaluated(round) else None
        return RoundRecord(
            round=round,
            evaluation=evaluation,
            ledger=self._ledger(round, updates),
            loss=tuple(update.loss for update in updates),
            seconds=clock.seconds(updates),
            digest=digest,
        )

    def _in_force(self, round: int, clients: Sequence[int]) -> Broadcast:
        """What clients train from in a round: a new broadcast where one is due, else the last."""
        if self.experiment.downlink.made_in(round) == round:
            return self.backend.encode_broadcast(round, clients)
        return self.broadcast

    def _ledger(self, round: int, updates: Sequence[ClientUpdate]) -> tuple[Transfer, ...]:
        """Bytes of each client; what it has from an earlier round it does not download again."""
        made = self.experiment.downlink.made_in(round)
        known = {t.client for record in self.history for t in record.ledger}
        holders = {t.client for record in self.history[made - 1 :] for t in record.ledger}

        def down(client: int) -> int:
            message = len(self.broadcast[edition(self.experiment, client)])
            return self._download * (client not in known) + message * (client not in holders)

        return tuple(Transfer(u.client, down(u.client), len(u.payload)) for u in updates)

    def _is_evaluated(self, round: int) -> bool:
        every, last = self.experiment.evaluation.every, self.experiment.federation.rounds
        return round % every == 0 or round == last

    def _evaluate(self, round: int) -> Evaluation:
        """Measure the state after a round through what clients of the next round train from."""
        broadcast = self._in_force(round + 1, [self._strongest])
        return self.backend.evaluate(round + 1, broadcast, self.memories.get(self._strongest))


class _Clock:
    """Wall time by phase."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[phase] = time.perf_counter() - start

    def seconds(self, updates: Sequence[ClientUpdate]) -> dict[str, float]:
        """Phases, the total, and training split in compute and communication."""
        busy: dict[int, float] = {}
        for update in updates:
            busy[update.host] = busy.get(update.host, 0.0) + update.seconds
        compute = max(busy.values())
        return {
            **self._phases,
            "client_compute": compute,
            "communication": self._phases["train"] - compute,
            "total": time.perf_counter() - self._start,
        }
