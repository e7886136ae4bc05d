"""The parties of a run as Ray actors, each pinned to its own bundle."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray.util import ActorPool
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.loop import Backend
from fedlpp_ray.federation.records import ClientUpdate, Evaluation, Floor, Memory
from fedlpp_ray.federation.wire import Broadcast, edition
from fedlpp_ray.runtime.placement import (
    SERVER_BUNDLE,
    Bundle,
    PlacementError,
    bundles,
    client_actors,
)


class Party:
    """A server or a client host in a process of its own, imported only there.

    Args:
        name: `module:class` of the party.
        arguments: The party's own.
    """

    def __init__(self, name: str, *arguments: Any) -> None:
        self._name, self._arguments = name, arguments

    def start(self) -> None:
        """Make the party. Not in the constructor, whose errors reach a caller as text only."""
        module, _, kind = self._name.partition(":")
        arguments, self._arguments = self._arguments, ()  # an emulator is not kept beside the model
        self._party = getattr(importlib.import_module(module), kind)(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the party."""
        return getattr(self._party, method)(*arguments)


SERVER = "fedlpp_ray.federation.server:Server"
CLIENT_HOST = "fedlpp_ray.federation.client:ClientHost"
SOLO = "fedlpp_ray.federation.solo:Solo"


class ClosingBackend(Backend, Protocol):
    """A `Backend` whose actors can be ended."""

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
        ray.exceptions.RayActorError: an actor's process died.
    """
    federated = experiment.method == "federated"
    return RayBackend(experiment, group) if federated else SoloActor(experiment, group)


class RayBackend:
    """A `Backend` of one server actor and several client actors.

    Args:
        experiment: What to run.
        group: Reservation with the bundles of `placement.bundles(experiment)`.

    Attributes:
        server, hosts: The actors, each a `Party`.

    Raises:
        PlacementError: the actors are not ready in `runtime.start_timeout`.
        AssetError, TaskError, UserError: a party could not be made.
        ray.exceptions.RayActorError: an actor's process died.
    """

    def __init__(self, experiment: Experiment, group: PlacementGroup) -> None:
        needed = bundles(experiment)
        self._experiment = experiment
        self.server = _start(group, SERVER_BUNDLE, needed, SERVER, experiment)
        self.hosts: list[Any] = []
        self._broadcast: tuple[Broadcast, Any] = ({}, None)
        waiting, timeout, emulator = [self.server], experiment.runtime.start_timeout, None
        if experiment.emulator.kind != "none":  # the server makes it, so it must be there first
            _wait_until_ready(waiting, timeout)
            waiting, emulator = [], self.server.call.remote("emulator")
        self.hosts = [
            _start(group, 1 + i, needed, CLIENT_HOST, experiment, i, emulator)
            for i in range(client_actors(experiment))
        ]
        _wait_until_ready([*waiting, *self.hosts], timeout, among=[self.server, *self.hosts])

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""
        return _get(self.server, "examples")  # type: ignore[no-any-return]

    def download(self) -> int:
        """Bytes of the emulator; 0 without one."""
        return _get(self.server, "download")  # type: ignore[no-any-return]

    def encode_broadcast(self, round: int, clients: Sequence[int]) -> Broadcast:
        """The server's quantized state, made in a round, in the editions that clients read."""
        return _get(self.server, "encode_broadcast", round, clients)  # type: ignore[no-any-return]

    def train(
        self, round: int, cohort: Mapping[int, Memory], broadcast: Broadcast
    ) -> list[ClientUpdate]:
        """One update from each client, in the order of the cohort; each actor pulls the next."""

        def send(host: Any, client: int) -> Any:
            message = self._for_client(client, broadcast)
            return host.call.remote("train", round, client, message, cohort[client])

        return list(ActorPool(self.hosts).map(send, cohort))

    def aggregate(self, round: int, broadcast: Broadcast, updates: Sequence[ClientUpdate]) -> str:
        """Fold the updates into the server's next state; returns its digest."""
        reference = self._put(broadcast)
        return _get(self.server, "aggregate", round, reference, updates)  # type: ignore[no-any-return]

    def evaluate(self, round: int, broadcast: Broadcast, memory: Memory) -> Evaluation:
        """The server's state and what a client has of it, measured at the same time."""
        reference = self._put(broadcast)
        server = self.server.call.remote("evaluate")
        client = self.hosts[0].call.remote("evaluate", round, reference, memory)
        return Evaluation(ray.get(server), *ray.get(client))

    def measure_floor(self) -> Floor:
        """What a client has without taking part."""
        return _get(self.hosts[0], "measure_floor")  # type: ignore[no-any-return]

    def adapter(self) -> dict[str, bytes]:
        """The server's state as the files of a PEFT adapter."""
        return _get(self.server, "adapter")  # type: ignore[no-any-return]

    def restore(self, adapter: dict[str, bytes]) -> str:
        """Take back the state of an `adapter`; returns its digest."""
        return _get(self.server, "restore", adapter)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the actors."""
        _end([self.server, *self.hosts])

    def _for_client(self, client: int, broadcast: Broadcast) -> Any:
        """All editions, which clients share; or, where each has its own, that of one client."""
        if not self._experiment.downlink.client_mask:
            return self._put(broadcast)
        key = edition(self._experiment, client)
        return {key: broadcast[key]}

    def _put(self, broadcast: Broadcast) -> Any:
        """The broadcast in the object store: put once, whoever uses it and however long."""
        if self._broadcast[0] != broadcast:
            self._broadcast = (broadcast, ray.put(broadcast))
        return self._broadcast[1]


class SoloActor:
    """A `Solo` in one actor; it is called as any backend is."""

    def __init__(self, experiment: Experiment, group: PlacementGroup) -> None:
        self._actor = _start(group, SERVER_BUNDLE, bundles(experiment), SOLO, experiment)
        _wait_until_ready([self._actor], experiment.runtime.start_timeout)

    def __getattr__(self, method: str) -> Any:
        return partial(_get, self._actor, method)

    def close(self) -> None:
        """End the actor."""
        _end([self._actor])


def _wait_until_ready(actors: Sequence[Any], timeout: float, among: Sequence[Any] = ()) -> None:
    """Start the parties; if one fails or is late, they and those `among` which they are end."""
    ready = [actor.start.remote() for actor in actors]
    done, waiting = ray.wait(ready, num_returns=len(ready), timeout=timeout)
    try:
        ray.get(done)
        if waiting:
            raise PlacementError(
                f"{len(waiting)} of {len(actors)} actors are not ready after {timeout:g} s "
                "(runtime.start_timeout, in which the server also makes an emulator); free "
                f"resources: {ray.available_resources()}"
            )
    except Exception:
        _end({*actors, *among})
        raise


def _end(actors: Collection[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _start(group: PlacementGroup, index: int, needed: list[Bundle], *arguments: Any) -> Any:
    """One party that takes the whole of its bundle."""
    resources = needed[index]
    pinned = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    actor = ray.remote(Party).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=pinned,
    )
    return actor.remote(*arguments)


def _get(actor: Any, method: str, *arguments: Any) -> Any:
    return ray.get(actor.call.remote(method, *arguments))
