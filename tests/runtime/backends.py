"""Backends in Ray, for tests of what they compute when ranks of theirs are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.backend import Backend
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.runtime import ray_backend, reserve
from tests.federation.test_loop import numbers


@contextmanager
def reserved(experiment: Experiment) -> Iterator[Any]:
    """An experiment's backend, in a reservation of its own."""
    with reserve(experiment) as group, closing(ray_backend(experiment, group)) as backend:
        yield backend


def disturbed(
    experiment: Experiment, backend: Backend, disturb: Callable[[], object]
) -> list[dict[str, object]]:
    """The numbers of a run in which something happens after the first round."""
    federation = Federation(experiment, backend)
    rounds = finished_rounds(federation)
    next(rounds)
    disturb()
    list(rounds)
    return numbers(federation.history)
