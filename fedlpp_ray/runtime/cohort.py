"""The training of one cohort: from its clients' actors to the server, whatever is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedlpp_ray.federation.loop import ServerLost
from fedlpp_ray.federation.records import Assignment, ClientReport, Fault, Memory, refused
from fedlpp_ray.messages import MessageError
from fedlpp_ray.runtime.jobs import Job, Pace, Refs
from fedlpp_ray.runtime.pool import Pool, in_words
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.server import ServerActor


class CohortTraining:
    """One round: an update goes from its client's actor to the server and nowhere else.

    Args:
        round: From 1.
        server: Has opened the round.
        pool: The client actors.
        reactor: Serves both.
        pace: What clients are expected to take.
    """

    def __init__(
        self, round: int, server: ServerActor, pool: Pool, reactor: Reactor, pace: Pace
    ) -> None:
        self._round, self._pace = round, pace
        self._server, self._pool, self._reactor = server, pool, reactor
        self._open: dict[int, Job] = {}
        self._at_server: set[int] = set()
        self._reports: list[ClientReport] = []

    def begin(self, each: Assignment, message: Any, memory: Memory) -> None:
        """Have a client train from a broadcast, given as a reference or as it is."""
        client = each.client

        def send(actor: Any) -> Refs:
            call = actor.train.options(num_returns=2)
            return call.remote(each.started, client, message, memory)  # type: ignore[no-any-return]

        def done(result: Any, payload: Refs) -> None:
            self._returned(job, client, result, payload)

        def failed(why: str) -> None:
            self._report(ClientReport(client, fault=Fault("failed", why)))

        name = f"round {self._round}, client {client}"
        job = self._open[client] = Job(name, send, done, failed, self._pace.expected(client))
        self._pool.submit(job)

    def abandon(self) -> None:
        """Wait for nobody any more."""
        for job in self._open.values():
            job.cancelled = True

    def reports(self, opened: Any, limit: float | None) -> Iterator[ClientReport]:
        """What became of each client, as it is known.

        Args:
            opened: Reference of the server's opening of the round.
            limit: Seconds after which those that are not done are late.
        """
        deadline = float("inf") if limit is None else time.monotonic() + limit
        self._server.result(opened)
        while self._open or self._reports:
            if not self._pool.until(lambda: bool(self._reports), deadline):
                self._close(f"not done {limit:g} s after the round began (runtime.round_deadline)")
                deadline = float("inf")
            while self._reports:
                yield self._reports.pop(0)

    def _close(self, why: str) -> None:
        """Let those be late whose update the server does not have by now."""
        for client, job in list(self._open.items()):
            if client not in self._at_server:
                self._pool.cancel(job, why)
                self._report(ClientReport(client, fault=Fault("late", why)))

    def _returned(self, job: Job, client: int, result: Any, payload: Refs) -> None:
        if isinstance(result, MessageError):
            cause = getattr(result, "cause", result)  # to it Ray adds the traceback there
            self._report(ClientReport(client, fault=Fault("refused", str(cause))))
            return
        self._pace.observe(client, result.seconds)
        self._at_server.add(client)
        verdict = self._server.send("verdict", self._round, client, payload[0])
        self._reactor.when(verdict, lambda ref: self._judged(job, result, ref))

    def _judged(self, job: Job, report: ClientReport, verdict: Any) -> None:
        if job.cancelled:
            return
        try:
            self._at_server.discard(report.client)
            refusal = ray.get(verdict)
        except RayActorError as error:
            raise ServerLost(str(error)) from error
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise
            self._pool.again(job, f"its update was lost: {in_words(error.cause)}")
        except RayError as error:
            self._pool.again(job, f"its update was lost: {in_words(error)}")
        else:
            self._report(report if refusal is None else refused(report, refusal))

    def _report(self, report: ClientReport) -> None:
        del self._open[report.client]
        self._reports.append(report)
