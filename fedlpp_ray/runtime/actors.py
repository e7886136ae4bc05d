"""The parties of an experiment, whatever its method, as actors."""

from __future__ import annotations

from typing import Protocol

from ray.util.placement_group import PlacementGroup

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.backend import Backend
from fedlpp_ray.runtime.backend import RayBackend
from fedlpp_ray.runtime.party import SOLO
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.server import ServerActor
from fedlpp_ray.runtime.solo import SoloActor


class ClosingBackend(Backend, Protocol):
    """A `Backend` whose actors can go on to another run, or end."""

    def begin(self, experiment: Experiment) -> bool:
        """Start another run in the same actors; False where it needs others."""

    def close(self) -> None:
        """End the actors."""


def ray_backend(experiment: Experiment, group: PlacementGroup) -> ClosingBackend:
    """The parties of an experiment, whatever its method, as actors.

    Args:
        experiment: What to run.
        group: Reservation with the bundles of `placement.bundles(experiment)`.

    Raises:
        PlacementError: the actors are not ready in `runtime.start_timeout`.
        AssetError, TaskError, UserError: a party could not be made.
    """
    if experiment.method == "federated":
        return RayBackend(experiment, group)
    if experiment.method == "local-only":
        return SoloActor(experiment, ServerActor(experiment, group, SOLO, Reactor()))
    from fedlpp_ray.runtime.ceiling import TrainedServer  # Ray Train, and Ray Data with it

    return SoloActor(experiment, TrainedServer(experiment, group))
