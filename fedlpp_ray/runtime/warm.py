"""Actors that serve one trial after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.placement_group import PlacementGroup

from fedlpp_ray.config import Experiment
from fedlpp_ray.runtime.actors import ClosingBackend, ray_backend

_left: list[tuple[PlacementGroup, ClosingBackend]] = []
"""The actors of the last trial of this process. They end with it."""


@contextmanager
def warm_backend(experiment: Experiment, group: PlacementGroup) -> Iterator[ClosingBackend]:
    """The parties of an experiment: in the actors of the last one, if Tune runs it here, too.

    What they have imported takes longer than to make the parties anew.

    Raises:
        PlacementError, UserError: as `ray_backend`.
    """
    backend = _take(experiment, group) or ray_backend(experiment, group)
    try:
        yield backend
    finally:
        _left.append((group, backend))


def _take(experiment: Experiment, group: PlacementGroup) -> ClosingBackend | None:
    while _left:
        reserved, backend = _left.pop()
        if reserved == group and backend.begin(experiment):
            return backend
        backend.close()
    return None
