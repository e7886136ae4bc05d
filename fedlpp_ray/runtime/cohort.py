"""The training of one cohort: from its clients' actors to the server, whatever is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from fedlpp_ray.federation.records import Assignment, ClientReport, Fault, Memory, refused
from fedlpp_ray.federation.secure import Masking
from fedlpp_ray.messages import MessageError
from fedlpp_ray.runtime.jobs import Job, Pace, Refs
from fedlpp_ray.runtime.pool import Pool, in_words, is_loss
from fedlpp_ray.runtime.server import ServerActor
from fedlpp_ray.runtime.sums import Sums
from fedlpp_ray.runtime.watch import draining

logger = logging.getLogger(__name__)


class CohortTraining:
    """One round. The driver hears reports; an update goes from its client's actor to the sums.

    Args:
        round: From 1.
        server: Has opened the round.
        pool: The client actors.
        pace: What clients are expected to take.
        sums: Where updates are added up.
    """

    def __init__(
        self,
        round: int,
        server: ServerActor,
        pool: Pool,
        pace: Pace,
        sums: Sums,
    ) -> None:
        self._round, self._pace, self._sums = round, pace, sums
        self._server, self._pool = server, pool
        self._training: dict[int, Job] = {}
        self._judging: dict[int, tuple[Job, Any]] = {}  # with the verdict
        self._accepted: dict[int, tuple[Job, ClientReport]] = {}
        self._faulty: list[ClientReport] = []
        self._verdicts: list[tuple[Job, ClientReport, Any]] = []  # that are there
        self._closed = ""
        self._nodes: dict[int, str] = {}  # where clients have trained

    def begin(
        self, each: Assignment, message: Any, memory: Memory, masking: Masking | None = None
    ) -> None:
        """Have a client train from a broadcast, given as a reference or as it is.

        Begun again it masks with the same half, of which an actor uses a copy.
        """
        client = each.client

        def send(actor: Any) -> Refs:
            call = actor.train.options(num_returns=2)
            arguments = each.started, client, message, memory, masking
            return call.remote(*arguments)  # type: ignore[no-any-return]

        def done(result: Any, payload: Refs) -> None:
            self._returned(job, client, result, payload)

        def failed(why: str) -> None:
            self._drop(client, Fault("failed", why))

        name = f"round {self._round}, client {client}"
        job = self._training[client] = Job(name, send, done, failed, self._pace.expected(client))
        self._pool.submit(job)

    def abandon(self) -> None:
        """Wait for nobody any more."""
        for job in (*self._training.values(), *(job for job, _ in self._judging.values())):
            job.cancelled = True

    def reports(self, opened: Any, deadline: float) -> Iterator[ClientReport]:
        """What became of each client, once all is at the server.

        Args:
            opened: Reference of the server's opening of the round.
            deadline: Of `time.monotonic`; those that are not done by then are late.
        """
        self._server.result(opened)
        while self._training or self._judging:
            if not self._pool.until(self._something_to_do, deadline):
                self._close("not done before runtime.round_deadline")
                deadline = float("inf")
            self._judge_all()
            if not (self._training or self._judging):
                for client, why in self._sums.collect().items():
                    self._again(client, why)
        yield from self._faulty
        yield from (report for _, report in self._accepted.values())

    def _something_to_do(self) -> bool:
        return bool(self._verdicts) or not (self._training or self._judging)

    def _close(self, why: str) -> None:
        """Let those be late that have not returned by now, or whose updates are lost after it."""
        self._closed = why
        for client, job in list(self._training.items()):
            self._pool.cancel(job, why)
            self._drop(client, Fault("late", why))

    def _returned(self, job: Job, client: int, result: Any, payload: Refs) -> None:
        if isinstance(result, MessageError):
            cause = getattr(result, "cause", result)  # to it Ray adds the traceback there
            self._drop(client, Fault("refused", str(cause)))
            return
        self._pace.observe(client, result.seconds)
        place = self._pool.slots[result.host].place
        node = self._nodes[client] = place.node if place else ""
        verdict = self._sums.add(client, node, payload[0])
        self._judging[client] = self._training.pop(client), verdict
        self._pool.reactor.when(verdict, lambda ref: self._verdicts.append((job, result, ref)))

    def _judge_all(self) -> None:
        """Look at the verdicts that are there: not in their callbacks, for the server is asked
        about a lost one, and that serves others."""
        while self._verdicts:
            self._judge(*self._verdicts.pop(0))

    def _judge(self, job: Job, report: ClientReport, verdict: Any) -> None:
        client = report.client
        if job.cancelled or self._judging.get(client) != (job, verdict):
            return  # nobody waits for it, or it was lost with that on another
        try:
            refusal = ray.get(verdict)
        except RayError as error:
            if not is_loss(error):
                raise
            lost = self._sums.lost(client)
            for each in lost:
                self._again(each, f"its update was lost: {in_words(error)}")
            if client in lost:
                return
            logger.warning("client %d: the answer to its update was lost, not the update", client)
            refusal = None
        del self._judging[client]
        if refusal is None:
            self._accepted[client] = job, report
        else:
            self._faulty.append(refused(report, refusal))

    def _again(self, client: int, why: str) -> None:
        """Have a client train again, unless its update was refused: so it would be again."""
        found = self._judging.pop(client, None) or self._accepted.pop(client, None)
        if found:
            self._training[client] = found[0]
            if self._closed:
                found[0].cancelled = True
                self._drop(client, Fault("late", f"{self._closed}; {why}"))
                return
            self._pool.again(found[0], why, counts=self._nodes[client] not in draining())

    def _drop(self, client: int, fault: Fault) -> None:
        del self._training[client]
        self._faulty.append(ClientReport(client, fault=fault))
