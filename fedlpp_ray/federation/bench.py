"""Where models that attacks make are measured, on examples that no attack is given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.held import Held
from fedlpp_ray.lora import ModelState, at_rank, with_residuals
from fedlpp_ray.privacy.view import Base
from fedlpp_ray.seeds import derive
from fedlpp_ray.state import State, part
from fedlpp_ray.training import Scored, Training, whole_descent


class Bench:
    """Measures states in the models that colluders have.

    Args:
        experiment: What was run.
        text: Its text.
        held: The models.
        device: Where to compute.
    """

    def __init__(
        self,
        experiment: Experiment,
        text: FederatedText,
        held: Mapping[Base, Held],
        device: torch.device,
    ) -> None:
        self._experiment, self._text, self._held = experiment, text, held
        self._device = device

    @property
    def initial(self) -> State:
        """What every client has from the seed before the first broadcast."""
        return self._held["client"].initial

    def score(self, state: State, base: Base) -> Scored:
        """Metrics of a state on the held-out examples, and each of these for itself.

        A state may have a residual of every adapted layer, also where the model has none.
        """
        held = self._held[base]
        extra = any(part(name) == "residual" for name in state.keys() - held.initial.keys())
        with with_residuals(held.model) if extra else nullcontext():
            (ModelState(held.model) if extra else held.state).write(state)
            return self._text.score(held.model, self._device)

    def alone(self) -> dict[str, Scored]:
        """What the strongest colluder has without taking part, as the run's `Floor` names it."""
        experiment, strongest = self._experiment, self._text.strongest
        held, rank = self._held["client"], experiment.lora.rank_of(strongest)
        found = {"base": self.score(self.initial, "client")}
        held.put({n: at_rank(n, x, rank) for n, x in self.initial.items()})
        Training(
            held.model,
            self._text.client(strongest),
            experiment.client,
            steps=experiment.federation.rounds * self._text.steps(strongest),
            seed=derive(experiment.seed, "local", 0, strongest),
            pad=self._text.pad,
            device=self._device,
            descent=whole_descent(experiment),
        ).run()
        return found | {"local_only": self._text.score(held.model, self._device)}
