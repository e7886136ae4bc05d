"""All parties in this process, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.loop import Backend
from fedlpp_ray.federation.records import Assignment, ClientUpdate, Evaluation, Memory
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.solo import Solo
from fedlpp_ray.federation.wire import Broadcast


def in_process(experiment: Experiment) -> Backend:
    """The parties of an experiment, whatever its method, in this process.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """
    return InProcess(experiment) if experiment.method == "federated" else Solo(experiment)


class InProcess:
    """A `Backend` without Ray: one server and one client host.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._server = Server(experiment)
        self._host = ClientHost(experiment, emulator=self._server.emulator())
        self.download = self._server.download
        self.encode_broadcast = self._server.encode_broadcast
        self.adapter = self._server.adapter
        self.restore = self._server.restore
        self.examples = self._server.examples
        self.measure_floor = self._host.measure_floor

    def train(
        self, round: int, cohort: Mapping[int, Memory], broadcast: Broadcast
    ) -> list[ClientUpdate]:
        """One update from each client, in the order of the cohort."""
        return [self._host.train(round, c, broadcast, memory) for c, memory in cohort.items()]

    def aggregate(self, round: int, broadcast: Broadcast, updates: Sequence[ClientUpdate]) -> str:
        """Fold the updates into the server's next state; returns its digest."""
        cohort = [Assignment(update.client, round) for update in updates]
        made = self._experiment.downlink.made_in(round)
        self._server.open_round(round, cohort, {made: broadcast})
        for update in updates:
            self._server.receive(round, update.client, update.payload)
        return self._server.aggregate(round)

    def evaluate(self, round: int, broadcast: Broadcast, memory: Memory) -> Evaluation:
        """The server's state and what a client has of it."""
        return Evaluation(self._server.evaluate(), *self._host.evaluate(round, broadcast, memory))
