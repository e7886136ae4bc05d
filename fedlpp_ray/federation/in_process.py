"""All parties in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.backend import Backend
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.records import (
    Assignment,
    ClientReport,
    Evaluation,
    Fault,
    Measured,
    Memory,
    Pending,
    refused,
    report,
)
from fedlpp_ray.federation.secure import Masking
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.solo import Solo
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.messages import MessageError
from fedlpp_ray.training import ALONE, Group


def in_process(experiment: Experiment) -> Backend:
    """The parties of an experiment, whatever its method, in this process.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """
    return InProcess(experiment) if experiment.method == "federated" else Solo(experiment)


class InProcess:
    """A `Backend` without Ray: one server and one client host.

    Args:
        experiment: What to run.
        group: Ranks of the server, of which this process is the first and the others
            `Server.follow`.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment, group: Group = ALONE) -> None:
        self._server = Server(experiment, group)
        stream = BaseStream.of(self._server.base_identity(), self._server.base_part)
        self._host = ClientHost(experiment, emulator=self._server.emulator(), stream=stream)
        self.close = self._server.close
        self._made_in = experiment.downlink.made_in
        self.download = self._server.download
        self.encode_broadcast = self._server.encode_broadcast
        self.open_session = self._server.open_session
        self.exchange = self._server.exchange
        self.aggregate = self._server.aggregate
        self.discard = self._server.discard
        self.finish = self._server.finish
        self.clipping = self._server.clipping
        self.adapter = self._server.adapter
        self.restore = self._server.restore
        self.examples = self._server.examples
        self.measure_floor = self._host.measure_floor
        self.attack = self._host.attack

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        maskings: Mapping[int, Masking] | None = None,
    ) -> Iterator[ClientReport]:
        """A report a client, in the order of the cohort; each trains when the last is folded."""
        self._server.open_round(round, list(cohort), broadcasts)
        for each, memory in cohort.items():
            broadcast = broadcasts[self._made_in(each.started)]
            masking = (maskings or {}).get(each.client)
            try:
                update = self._host.train(each.started, each.client, broadcast, memory, masking)
            except MessageError as error:
                yield ClientReport(each.client, fault=Fault("refused", str(error)))
                continue
            refusal = self._server.verdict(round, each.client, update.payload)
            yield report(update) if refusal is None else refused(report(update), refusal)

    def evaluate(
        self,
        round: int,
        broadcast: Broadcast,
        memory: Memory,
        newest: Mapping[int, Broadcast],
    ) -> Pending:
        """The server's state and what a client has of it, measured now."""
        server, start = self._server.evaluate(), time.perf_counter()
        before, after, leak, seconds = self._host.evaluate(round, broadcast, memory, newest)
        evaluation = Evaluation(server, before, after, leak)
        measured = Measured(evaluation, time.perf_counter() - start, seconds)
        return lambda: measured

    def renew_server(self) -> None:
        """Nothing to do: it is lost only with this process."""
