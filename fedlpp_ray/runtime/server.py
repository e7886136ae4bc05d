"""The actor of a server, and its loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.backend import ServerLost
from fedlpp_ray.runtime.party import Party
from fedlpp_ray.runtime.placement import (
    Bundle,
    PlacementError,
    bundles,
    client_bundle,
    client_indices,
    server_indices,
)
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.watch import what_is_missing

logger = logging.getLogger(__name__)


class ServerActor:
    """The actor that has bundle 0: it is waited for, and its loss has a name.

    Args:
        experiment: What to run.
        group: Reservation.
        party: Which.
        reactor: Serves other results while it is waited for.

    Raises:
        PlacementError, UserError: as `ray_backend`.
    """

    def __init__(
        self, experiment: Experiment, group: PlacementGroup, party: str, reactor: Reactor
    ) -> None:
        self._group, self._party, self._reactor = group, party, reactor
        self.renew(experiment)

    def renew(self, experiment: Experiment) -> None:
        """Put a new actor in the place of one that is gone."""
        self.actor = server_in(self._group, experiment)
        self.begin(experiment)

    def begin(self, experiment: Experiment) -> None:
        """Make the party anew in the same actor."""
        self._experiment = experiment
        self._start = self.actor.start.remote(self._party, experiment)

    def wait(self) -> None:
        """Until it has started."""
        self._made_good(self._wait)

    def constant(self, method: str) -> Any:
        """Ask for what every server of the experiment answers alike, so that a loss is made good.

        Only while the state is as it is made from the seed.
        """

        def ask() -> Any:
            self._wait()
            return self.ask(method)

        return self._made_good(ask)

    def _made_good(self, act: Callable[[], Any]) -> Any:
        """Act, with a new server where it is lost meanwhile."""
        for _ in range(self._experiment.runtime.attempts - 1):
            try:
                return act()
            except ServerLost as error:
                reason = str(error).partition("\n")[0]
                logger.warning("the server is made anew: %s", reason)
                self.end()  # it may be there, and only its answer be lost
                self.renew(self._experiment)
        return act()

    def _wait(self) -> None:
        timeout = self._experiment.runtime.start_timeout
        ready: list[Any] = []
        self._reactor.when(self._start, ready.append)
        if not self._reactor.until(lambda: bool(ready), time.monotonic() + timeout):
            raise PlacementError(
                f"the server is not ready after {timeout:g} s (runtime.start_timeout, in which it "
                f"also makes an emulator); {what_is_missing()}"
            )
        self.result(self._start)

    def send(self, method: str, *arguments: Any) -> Any:
        """Call a method; returns the reference of its result."""
        return self.actor.call.remote(method, *arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method and wait for its result.

        Raises:
            ServerLost: the actor is gone.
        """
        return self.result(self.send(method, *arguments))

    def result(self, reference: Any) -> Any:
        """Wait for the result of a call.

        Raises:
            ServerLost: the actor is gone.
        """
        try:
            return self._reactor.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, RayError):  # what it needed is gone, such as another rank
                raise ServerLost(str(error.cause)) from error
            raise
        except RayError as error:
            raise ServerLost(str(error)) from error

    def check(self) -> None:
        """Have the actor answer.

        Raises:
            ServerLost: it is gone.
        """
        self.result(self.actor.answer.remote())

    def end(self) -> None:
        """End the actor."""
        ray.kill(self.actor)


def server_in(group: PlacementGroup, experiment: Experiment) -> Any:
    """A new actor for a server, in its bundles."""
    config, needed = experiment.server, bundles(experiment)
    indices = server_indices(experiment)
    options = [_options(needed[i], _pinned(group, i)) for i in indices]
    return _party(options, ranks=config.num_workers > 1 or config.zero.stage > 0)


def client_in(group: PlacementGroup, number: int, experiment: Experiment) -> Any:
    """A new actor for a client host: in its bundles, or, if none is reserved for it, anywhere."""
    config, needed = experiment.client, client_bundle(experiment)
    options = [_options(needed, _pinned(group, i)) for i in client_indices(experiment, number)]
    anywhere = [_options(needed)] * config.num_workers
    return _party(options or anywhere, ranks=config.num_workers > 1 or config.zero.stage > 0)


def _party(options: list[dict[str, Any]], *, ranks: bool) -> Any:
    first, *others = options
    return ray.remote(Party).options(**first).remote(others if ranks else None)


def _pinned(group: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)


def _options(needed: Bundle, where: Any = "DEFAULT") -> dict[str, Any]:
    return {
        "num_cpus": needed["CPU"],
        "num_gpus": needed.get("GPU", 0),
        "scheduling_strategy": where,
    }
