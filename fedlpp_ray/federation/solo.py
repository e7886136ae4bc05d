"""The runs that a federation is compared with: one model trained on one data set.

The ceiling is LoRA on all clients' examples together (`method: centralised`), the floor LoRA on
those of one client alone (`method: local-only`). Each is a `Backend`, so that the same loop runs,
evaluates, reports and resumes it; nothing travels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.adapter import AdapterFiles, adapter_state
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.data import FederatedText, base_of, load_base
from fedlpp_ray.federation.emulation import (
    broadcast_modules,
    emulate,
    load_client_base,
    trained_whole,
)
from fedlpp_ray.federation.private import UNCLIPPED, Clipping
from fedlpp_ray.federation.records import (
    Assignment,
    ClientReport,
    Evaluation,
    Floor,
    Measured,
    Memory,
    Pending,
)
from fedlpp_ray.federation.sampling import Cohorts
from fedlpp_ray.federation.wire import Broadcast, edition
from fedlpp_ray.lora import ModelState, add_adapter, store_in_bf16
from fedlpp_ray.models import BaseParts, shard
from fedlpp_ray.seeds import derive
from fedlpp_ray.state import State, state_digest
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import (
    ALONE,
    Group,
    Training,
    configure_torch,
    dismiss,
    follow,
    together,
    whole_descent,
)

TRAINING = "training.pt"


class Solo:
    """A `Backend` of one party.

    In a round, `centralised` makes as many steps as the federation's cohort together, on the
    full-precision base, and `local-only` as many as the strongest client, on the client's base.
    One optimizer goes through all rounds, and `client.schedule` is spread over them all.

    Args:
        experiment: What to run; `method` is 'centralised' or 'local-only'.
        group: Ranks that train one model together, sharing its batches; each has this object, and
            all but the first `follow`. With `server.zero.stage` 3 they share the base, too.

    Attributes:
        group: The ranks.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment, group: Group = ALONE) -> None:
        self._experiment, self.group = experiment, group
        self._pooled = experiment.method == "centralised"
        self._device = configure_torch(experiment.runtime.threads, experiment.runtime.server_gpus)
        self._text = FederatedText(experiment, group)
        self._parts: BaseParts | None = None
        base, adapter, lora = self._base(), experiment.adapter, experiment.lora
        self._model = add_adapter(base, adapter, lora, experiment.seed).to(self._device)
        self._state, self._files = ModelState(self._model), AdapterFiles(self._model)
        if experiment.client.compute == "bf16":
            store_in_bf16(self._model)
        seed, examples = experiment.seed, self._text.examples
        self._cohorts = Cohorts(experiment.federation, seed, examples)
        strongest, rounds = self._text.strongest, range(1, experiment.federation.rounds + 1)
        # The floor of a federation is trained with the same seed.
        purpose = ("centralised",) if self._pooled else ("local", 0, strongest)
        self._training = Training(
            self._model,
            self._text.pooled() if self._pooled else self._text.client(strongest),
            experiment.client,
            steps=sum(map(self._steps, rounds)),
            seed=derive(experiment.seed, *purpose),
            pad=self._text.pad,
            device=self._device,
            descent=whole_descent(experiment),
            group=group,
            zero=experiment.server.zero,
        )

    def _base(self) -> nn.Module:
        """The frozen model that is trained on: W0 if centralised, else a client's."""
        experiment, text = self._experiment, self._text
        if not self._pooled:
            return load_client_base(experiment, text, self._emulator())
        spread = experiment.server.zero.stage == 3
        return self._spread() if spread else load_base(experiment, text)

    def _spread(self) -> nn.Module:
        """W0 spread over the ranks, which the client of the floor receives layer by layer."""
        experiment, base = self._experiment, base_of(self._experiment, self._text)
        model, _ = base.load(as_stored=True)
        whole = broadcast_modules(experiment, model)
        kept = trained_whole(experiment, model, self._text)
        model = shard(model, experiment.server.zero, self._device, kept)
        self._parts = BaseParts(base, model, experiment.client, whole)
        return model

    def _emulator(self) -> bytes | None:
        """What the federation's clients have in the place of W0."""
        experiment, text = self._experiment, self._text
        if experiment.emulator.kind == "none":
            return None
        return emulate(experiment, text, load_base(experiment, text), self._device)

    @classmethod
    def follow(cls, experiment: Experiment, group: Group) -> None:
        """Be another rank than the first, with the same arguments, until that is done."""
        follow(cls(experiment, group))

    def close(self) -> None:
        """Be done: the other ranks end."""
        dismiss(self.group)

    def _steps(self, round: int) -> int:
        """Steps of a round."""
        if not self._pooled:
            return self._text.steps(self._text.strongest)
        return sum(map(self._text.steps, self._cohorts.of(round)))

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""
        return self._text.examples

    def download(self) -> int:
        """Nothing travels."""
        return 0

    def encode_broadcast(
        self, round: int, clients: Sequence[int], beside: Sequence[int] = ()
    ) -> Broadcast:
        """Nothing travels."""
        return {edition(self._experiment, self._text.strongest): b""}

    def open_session(self, round: int, clients: Sequence[int]) -> None:
        """Nothing is masked."""

    def exchange(self, round: int, sent: Mapping[int, bytes]) -> dict[int, bytes]:
        """Nothing is masked."""
        return {}

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        *_: object,
    ) -> Iterator[ClientReport]:
        """Train on, whoever is sampled: one report, of a client that sends nothing."""
        start = time.perf_counter()
        loss = self._advance(self._steps(round))
        if not math.isfinite(loss):
            lr = self._experiment.client.lr
            raise UserError(f"round {round}: the training diverged (client.lr = {lr:g})")
        seconds = time.perf_counter() - start
        yield ClientReport(self._text.strongest, loss=loss, seconds=seconds)

    @together
    def _advance(self, steps: int) -> float:
        return self._training.advance(steps)

    def aggregate(self, round: int) -> str:
        """The digest of the model's state."""
        return state_digest(self._state.read())

    discard = aggregate

    def finish(self) -> None:
        """There is nothing but the one model."""

    def clipping(self) -> Clipping:
        """Nothing is clipped."""
        return UNCLIPPED

    def evaluate(self, round: int, broadcast: Broadcast, memory: Memory, *_: object) -> Pending:
        """The one model: the server's if centralised, else a client's."""
        start = time.perf_counter()
        found = self._measure()
        evaluation = Evaluation(*(found, None, None) if self._pooled else (None, None, found))
        measured = Measured(evaluation, time.perf_counter() - start)
        return lambda: measured

    @together
    def _measure(self) -> Metrics:
        return self._text.evaluate(self._model, self._device)

    def measure_floor(self) -> Floor:
        """What a client has without taking part: that of the federation with the same keys.

        The client is in this process alone, whatever the number of ranks.
        """
        known = (self._parts.identity, len(self._parts)) if self._parts else None
        here = {"runtime.client_gpus": self._experiment.runtime.server_gpus}
        return ClientHost(
            self._experiment.with_values(here),
            emulator=self._emulator(),
            stream=BaseStream.of(known, self._part),
        ).measure_floor()

    @together
    def _part(self, number: int) -> bytes:
        """One part of the client's base, as all ranks make it."""
        assert self._parts is not None
        return self._parts.part(number, make=self.group.rank == 0)

    def attack(self, *_: object) -> None:
        """Nothing travels."""

    def adapter(self) -> dict[str, bytes]:
        """The model as a PEFT adapter, and `training.pt`: what the optimizer remembers."""
        return self._files.of(self._state.read()) | {TRAINING: self._save()}

    @together
    def _save(self) -> bytes:
        return self._training.save()

    def restore(self, adapter: dict[str, bytes]) -> str:
        """Take back the state of an `adapter`; returns its digest.

        Raises:
            ValueError: it is an adapter of another model or rank.
        """
        state = adapter_state(adapter, self._state.read())
        self._go_on(state, adapter[TRAINING])
        return state_digest(self._state.read())

    @together
    def _go_on(self, state: State, training: bytes) -> None:
        self._state.write(state)
        self._training.load(training)

    def renew_server(self) -> None:
        """Nothing to do: it is lost only with this process."""
