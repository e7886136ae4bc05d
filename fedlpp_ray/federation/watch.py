"""The leak while a run goes on: what the newest broadcasts give away by arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Never

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.means import means_of
from fedlpp_ray.federation.received import Reader
from fedlpp_ray.federation.sampling import colluders
from fedlpp_ray.federation.wire import Broadcast, edition
from fedlpp_ray.privacy.attacks import find_attacks
from fedlpp_ray.privacy.view import Base, Means, View, ViewError
from fedlpp_ray.state import State


def is_attackable(experiment: Experiment) -> bool:
    """Whether the server has a model, all of which it sends to clients."""
    personal = find_method(experiment.server.aggregation).personal
    return experiment.method == "federated" and not personal


@dataclass(frozen=True)
class Bare:
    """Colluders that only read: `privacy.view.Tools` without a model or examples.

    Attributes:
        clients: They.
        means: Whether they know the architecture.
    """

    clients: frozenset[int]
    means: frozenset[Means]
    bases: tuple[Base, ...] = ("client",)

    def loss(self, *_: object) -> Never:
        """Refused.

        Raises:
            ViewError: always, as the others.
        """
        raise ViewError("an attack that is measured during a run has no examples and no model")

    take_part = tune = distil = loss


class Watch:
    """When the leak is measured, and of which broadcasts.

    Args:
        experiment: What is run.
        examples: (clients,) number of examples of each.

    Attributes:
        at_end: Whether the finished run is attacked (`adversary.at_end`).
    """

    def __init__(self, experiment: Experiment, examples: Sequence[int]) -> None:
        self._experiment, self._config = experiment, experiment.adversary
        self._clients = colluders(experiment, examples)
        self._means = means_of(experiment)
        self._editions = {edition(experiment, client) for client in self._clients}
        attackable = is_attackable(experiment)
        self._attacks = find_attacks(list(self._config.watch if attackable else ()))
        self.at_end = attackable and bool(self._config.at_end)

    def due(self, round: int) -> bool:
        """Whether the leak is measured with the evaluation after a round, which is evaluated."""
        before, every = round - self._experiment.evaluation.every, self._config.watch_every
        last = round == self._experiment.federation.rounds
        return bool(self._attacks) and (last or round // every > before // every)

    def newest(self, broadcasts: Mapping[int, Broadcast]) -> dict[int, Broadcast]:
        """Of the newest broadcasts what the adversary reads; of none where nothing is measured."""
        if not self._attacks:
            return {}
        return dict(list(self.read(broadcasts).items())[-self._config.watch_window :])

    def read(self, broadcasts: Mapping[int, Broadcast]) -> dict[int, Broadcast]:
        """What the adversary reads of broadcasts, by the round in which each was made."""
        return {
            made: own
            for made, broadcast in sorted(broadcasts.items())
            if (own := {key: broadcast[key] for key in sorted(self._editions & broadcast.keys())})
        }

    def states(
        self, reader: Reader, newest: Mapping[int, Broadcast]
    ) -> Iterator[tuple[str, State]]:
        """What each attack makes of the newest broadcasts; nothing without any.

        Args:
            reader: A client's.
            newest: From `newest`.
        """
        if not newest:
            return
        readable = {client: frozenset(newest) for client in self._clients}
        received = tuple(reader.read(newest, readable))
        tools = Bare(frozenset(self._clients), self._means)
        view = View(received, self._experiment.lora.rank, tools, readable)
        for name, known in self._attacks.items():
            yield name, known.attack(view)
