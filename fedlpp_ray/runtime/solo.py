"""A run that is no federation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import Assignment, ClientReport, Memory, Pending
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.runtime.placement import actors_of
from fedlpp_ray.runtime.server import ServerActor


class SoloActor:
    """A `Solo` behind one actor.

    Args:
        experiment: What to run.
        server: The actor.

    Raises:
        PlacementError, UserError: as `ray_backend`.
    """

    def __init__(self, experiment: Experiment, server: ServerActor) -> None:
        self._experiment, self._server = experiment, server
        try:
            self._server.wait()
        except BaseException:
            self.close()
            raise
        ask = self._server.ask
        self.examples = partial(self._server.constant, "examples")
        self.download = partial(self._server.constant, "download")
        self.encode_broadcast = partial(ask, "encode_broadcast")
        self.open_session = partial(ask, "open_session")
        self.exchange = partial(ask, "exchange")
        self.aggregate = partial(ask, "aggregate")
        self.discard = partial(ask, "discard")
        self.finish = partial(ask, "finish")
        self.clipping = partial(ask, "clipping")
        self.measure_floor = partial(ask, "measure_floor")
        self.adapter = partial(ask, "adapter")
        self.restore = partial(ask, "restore")

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        *_: object,
    ) -> Iterator[ClientReport]:
        """Train on when the report is asked for: until then the state is that of the last round."""
        yield from self._server.ask("train", round, {}, {})

    def evaluate(self, round: int, broadcast: Broadcast, memory: Memory, *_: object) -> Pending:
        """Begin to measure the one model."""
        reference = self._server.send("evaluate", round, broadcast, memory)
        return lambda: self._server.result(reference)

    def attack(self, *_: object) -> None:
        """Nothing travels."""

    def renew_server(self) -> None:
        """A new actor."""
        self._server.end()
        self._server.renew(self._experiment)
        self._server.wait()

    def begin(self, experiment: Experiment) -> bool:
        """Start another run in the same actor; False where it needs others."""
        if actors_of(experiment) != actors_of(self._experiment):
            return False
        self._experiment = experiment
        try:
            self._server.begin(experiment)
            self._server.wait()
        except BaseException:
            self.close()
            raise
        return True

    def close(self) -> None:
        """End the actor."""
        self._server.end()
