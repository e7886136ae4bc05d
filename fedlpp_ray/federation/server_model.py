"""The full-precision model of the server, on each of its ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.adapter import AdapterFiles
from fedlpp_ray.federation.data import FederatedText, base_of, load_base
from fedlpp_ray.federation.emulation import (
    broadcast_modules,
    correction_of,
    emulate,
    trained_whole,
)
from fedlpp_ray.lora import ModelState, add_adapter, add_residuals
from fedlpp_ray.models import BaseParts, shard
from fedlpp_ray.seeds import derive
from fedlpp_ray.state import Part, State
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import (
    ALONE,
    Group,
    Training,
    configure_torch,
    constant_descent,
    together,
)


class ServerModel:
    """W0 with an adapter, and what is done with both; the state itself is the caller's.

    Where the server has several ranks, each has this object, with the same arguments.

    Args:
        experiment: What to run.
        text: Its text.
        group: The ranks.

    Attributes:
        group: The ranks.
        initial: The state that the model begins with.
        files: Writes a state as an adapter.
        emulator: What clients have in the place of W0, or None.
        parts: What clients have of W0, or None where they make it from the checkpoint.

    Raises:
        AssetError, ValueError: the model cannot be used.
    """

    def __init__(self, experiment: Experiment, text: FederatedText, group: Group = ALONE) -> None:
        self._experiment, self._text, self.group = experiment, text, group
        config = experiment.server
        self._device = configure_torch(experiment.runtime.threads, experiment.runtime.server_gpus)
        self.parts: BaseParts | None = None
        if config.zero.stage == 3:
            base = base_of(experiment, text)
            loaded, _ = base.load(as_stored=True)
            whole = broadcast_modules(experiment, loaded)
            trained = trained_whole(experiment, loaded, text)
            model = shard(loaded, config.zero, self._device, trained)
            if experiment.emulator.kind == "none":
                self.parts = BaseParts(base, model, experiment.client, whole)
        else:
            model = load_base(experiment, text)
        self.emulator = emulate(experiment, text, model, self._device)
        self._correction = correction_of(experiment, model)
        adapted = add_adapter(model, experiment.adapter, experiment.lora, experiment.seed)
        self._model = adapted.to(self._device)
        if find_method(config.aggregation).writes_base:
            add_residuals(self._model)
        self._state, self.files = ModelState(self._model), AdapterFiles(self._model)
        self.initial = self._state.read()

    @together
    def evaluate(self, state: State) -> Metrics:
        """Metrics of the base with a state, corrected as `server.base_correction` says."""
        self._state.write(state)
        with self._corrected():
            return self._text.evaluate(self._model, self._device)

    @together
    def tune(self, round: int, state: State) -> State:
        """The state after `server.tune_steps` steps on the server's own examples."""
        config = self._experiment.server
        parts = find_method(config.aggregation).trained(round)
        return self._train(state, parts, config.tune_steps, config.tune_lr, round)

    @together
    def finish(self, state: State) -> State:
        """The state after `server.final_tune_steps` steps, on the base on which it is measured.

        All is trained that is in any round.
        """
        config = self._experiment.server
        rounds = range(1, self._experiment.federation.rounds + 1)
        parts = frozenset[Part]().union(*map(find_method(config.aggregation).trained, rounds))
        with self._corrected():
            return self._train(state, parts, config.final_tune_steps, config.final_tune_lr, "final")

    def _train(
        self, state: State, parts: frozenset[Part], steps: int, lr: float, purpose: int | str
    ) -> State:
        """The state after training some of its parts; `purpose` seeds it."""
        client = self._experiment.client
        self._state.write(state)
        with self._state.training_only(parts):
            Training(
                self._model,
                self._text.servers(),
                client.model_copy(update={"lr": lr}),
                steps=steps,
                seed=derive(self._experiment.seed, "server", purpose),
                pad=self._text.pad,
                device=self._device,
                descent=constant_descent(client),
                group=self.group,
                zero=self._experiment.server.zero,
            ).run()
        return self._state.read()

    def _corrected(self) -> AbstractContextManager[None]:
        """Inside the block the base is that on which the server's model is measured."""
        return self._correction.applied() if self._correction else nullcontext()

    def correction(self) -> dict[str, Tensor]:
        """R, as `Correction.tensors`; empty without one."""
        return self._correction.tensors() if self._correction else {}

    @together
    def part(self, number: int) -> bytes:
        """One part of `parts`, as all ranks make it."""
        assert self.parts is not None
        return self.parts.part(number, make=self.group.rank == 0)
