"""The parties of a run as Ray actors, each pinned to its own bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.private import Clipping
from fedlpp_ray.federation.records import (
    Assignment,
    ClientReport,
    Evaluation,
    Final,
    Floor,
    Measured,
    Memory,
    Pending,
    RoundRecord,
)
from fedlpp_ray.federation.secure import Masking
from fedlpp_ray.federation.wire import Broadcast, edition
from fedlpp_ray.privacy.secure import Session
from fedlpp_ray.runtime.cohort import CohortTraining
from fedlpp_ray.runtime.jobs import Answer, Job, Pace
from fedlpp_ray.runtime.party import CLIENT_HOST, SERVER
from fedlpp_ray.runtime.placement import (
    actors_of,
    client_actors,
    client_bundle,
    client_indices,
    in_words,
    is_whole,
)
from fedlpp_ray.runtime.pool import Pool, Slot
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.server import ServerActor, client_in
from fedlpp_ray.runtime.sums import AtServer, OnNodes, Sums

if TYPE_CHECKING:
    from fedlpp_ray.federation.attacked import Attacked

_SECONDS = 5.0
"""Seconds between two looks at whether the server is there."""


class ServerGone(RayError):  # type: ignore[misc]
    """A client could not start because the server is lost, which is no fault of its own."""

    preempted = True


class RayBackend:
    """A `Backend` of one server actor and a pool of client actors.

    Args:
        experiment: What to run.
        group: Reservation with the bundles of `placement.bundles(experiment)`.

    Attributes:
        server: The server's actor.
        pool: The client actors.

    Raises:
        PlacementError, UserError: as `ray_backend`.
    """

    def __init__(self, experiment: Experiment, group: PlacementGroup) -> None:
        self._experiment, self._group = experiment, group
        self._begun_again = False
        self._reactor = Reactor()
        self.server = ServerActor(experiment, group, SERVER, self._reactor)
        self._on_nodes = OnNodes(self.server, self._reactor)
        self._pool: Pool | None = None
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Until the server and one client actor have started; the others join when they have."""
        self._emulator: Any = None
        self._put: dict[int, tuple[Broadcast, Any]] = {}
        self._training: CohortTraining | None = None
        self._evaluation_seconds = 0.0
        if self._experiment.emulator.kind != "none":  # the server makes it, so it comes first
            # Of this process: clients that start after the server's node is lost read it too.
            self._emulator = ray.put(self.server.constant("emulator"))
        self._base = self.server.constant("base_identity") if self._streams else None
        if self._pool is None:
            self._pool = self._make_pool()
        else:
            self._pool.begin()
        self.server.wait()
        while not self.pool.until(lambda: bool(self.pool.working), time.monotonic() + _SECONDS):
            self.examples()  # clients may wait for their base, from a server that is lost
        self._pace = Pace(self._steps(self.examples()))

    @property
    def _streams(self) -> bool:
        """Whether clients have their base from the server."""
        return self._experiment.server.zero.stage == 3 and self._experiment.emulator.kind == "none"

    def begin(self, experiment: Experiment) -> bool:
        """Start another run in the same actors; False where it needs others."""
        if actors_of(experiment) != actors_of(self._experiment):
            return False
        self._experiment, self._begun_again = experiment, True
        self._reactor.clear()
        try:
            self.server.begin(experiment)
            self._prepare()
        except BaseException:
            self.close()
            raise
        return True

    @property
    def pool(self) -> Pool:
        """The client actors."""
        assert self._pool is not None
        return self._pool

    def _make_pool(self) -> Pool:
        runtime, size = self._experiment.runtime, client_actors(self._experiment)
        return Pool(
            self._reactor,
            self._start,
            size=size,
            reserved=sum(bool(client_indices(self._experiment, each)) for each in range(size)),
            whole=partial(is_whole, self._group),
            attempts=runtime.attempts,
            timeout=runtime.start_timeout,
            needs=in_words(client_bundle(self._experiment)),
            advise=self._advise,
        )

    def _advise(self, error: BaseException) -> str:
        from fedlpp_ray.federation.footprint import out_of_memory_advice  # takes seconds

        return out_of_memory_advice(self._experiment, error)

    def _start(self, slot: Slot) -> tuple[Any, Any]:
        """A client actor in its bundle, or, beyond those reserved, wherever there is room."""
        experiment = self._experiment
        actor = slot.actor or client_in(self._group, slot.number, experiment)
        if slot.room != 1.0:
            share = min(1.0, experiment.runtime.client_gpus * slot.room)
            experiment = experiment.with_values({"runtime.client_gpus": share})
        stream = BaseStream.of(self._base, partial(_part_of, self.server.actor))
        arguments = experiment, slot.number, self._emulator, stream
        return actor, actor.start.remote(CLIENT_HOST, *arguments)

    def _steps(self, examples: Sequence[int]) -> Any:
        config, size = self._experiment.federation, self._experiment.client.batch_size
        return lambda client: config.steps(examples[client], size)

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""
        return self.server.constant("examples")  # type: ignore[no-any-return]

    def download(self) -> int:
        """Bytes of the emulator; 0 without one."""
        return self.server.constant("download")  # type: ignore[no-any-return]

    def encode_broadcast(
        self, round: int, clients: Sequence[int], beside: Sequence[int] = ()
    ) -> Broadcast:
        """The server's quantized state, made in a round, in the editions that clients read."""
        ask = self.server.ask
        return ask("encode_broadcast", round, clients, beside)  # type: ignore[no-any-return]

    def open_session(self, round: int, clients: Sequence[int]) -> Session | None:
        """Begin secure aggregation with all who are sampled for a round; None without it."""
        return self.server.ask("open_session", round, clients)  # type: ignore[no-any-return]

    def exchange(self, round: int, sent: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """Take to the server what clients send in a step of secure aggregation, which that ends."""
        return self.server.ask("exchange", round, sent)  # type: ignore[no-any-return]

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        maskings: Mapping[int, Masking] | None = None,
    ) -> Iterator[ClientReport]:
        """Begin to train the cohort, the longest first; reports come as clients finish."""
        references = {made: self._stored(made, each) for made, each in broadcasts.items()}
        self._put = {made: each for made, each in self._put.items() if made in broadcasts}
        opened = self.server.send("open_round", round, list(cohort), references)
        sums = self._sums(round, list(cohort), references)
        training = CohortTraining(round, self.server, self.pool, self._pace, sums)
        self._training = training
        for each in sorted(cohort, key=lambda each: -self._pace.expected(each.client)):
            made = self._experiment.downlink.made_in(each.started)
            message = self._for_client(each.client, made, broadcasts[made])
            training.begin(each, message, cohort[each], (maskings or {}).get(each.client))
        return training.reports(opened, self._deadline())

    def _sums(self, round: int, cohort: list[Assignment], broadcasts: Mapping[int, Any]) -> Sums:
        """The server adds up, or on many nodes each of them; masked updates the server alone."""
        nodes = {slot.place.node for slot in self.pool.working if slot.place}
        secure = self._experiment.secure.threshold is not None
        if secure or len(nodes) < self._experiment.runtime.partial_sums_from:
            return AtServer(self.server, round)
        self._on_nodes.open(round, self.server.send("opening", round, cohort, broadcasts))
        return self._on_nodes

    def aggregate(self, round: int) -> str:
        """Make what was folded the server's next state; returns its digest."""
        return self.server.ask("aggregate", round)  # type: ignore[no-any-return]

    def discard(self, round: int) -> str:
        """Forget what was folded; returns the digest of the state."""
        return self.server.ask("discard", round)  # type: ignore[no-any-return]

    def finish(self) -> Final | None:
        """Make the server's final model, if the experiment has one."""
        return self.server.ask("finish")  # type: ignore[no-any-return]

    def clipping(self) -> Clipping:
        """C in the round last closed, and the noised fraction of its clients within C, if any."""
        return self.server.ask("clipping")  # type: ignore[no-any-return]

    def evaluate(
        self,
        round: int,
        broadcast: Broadcast,
        memory: Memory,
        newest: Mapping[int, Broadcast],
    ) -> Pending:
        """Begin to measure the server's state, and at any client actor what a client has of it."""
        reference = self._stored(self._experiment.downlink.made_in(round), broadcast)
        attacked = ray.put(newest) if newest else None
        server = self.server.send("evaluate")
        client = self._client_job(
            "evaluation", lambda actor: actor.evaluate.remote(round, reference, memory, attacked)
        )

        def wait() -> Measured:
            *found, leak, seconds = self._wait_for(client)
            self._evaluation_seconds = seconds
            return Measured(Evaluation(self.server.result(server), *found), seconds, leak)

        return wait

    def measure_floor(self) -> Floor:
        """What a client has without taking part."""
        answer = self._client_job("floor", lambda actor: actor.call.remote("measure_floor"))
        floor: Floor = self._wait_for(answer)
        self._remember_peaks()
        return floor

    def attack(
        self, broadcasts: Mapping[int, Broadcast], history: Sequence[RoundRecord]
    ) -> Attacked:
        """The ladder on a finished run, at any client actor and however long it takes."""
        arguments = ray.put(broadcasts), list(history)
        answer = self._client_job("attack", lambda actor: actor.call.remote("attack", *arguments))
        self.pool.until(lambda: answer.there, float("inf"))
        return answer.get()  # type: ignore[no-any-return]

    def adapter(self) -> dict[str, bytes]:
        """The server's state as the files of a PEFT adapter."""
        return self.server.ask("adapter")  # type: ignore[no-any-return]

    def restore(self, adapter: dict[str, bytes]) -> str:
        """Take back the state of an `adapter`; returns its digest."""
        return self.server.ask("restore", adapter)  # type: ignore[no-any-return]

    def renew_server(self) -> None:
        """A new server; client actors drop what they were to do for the old one."""
        self.pool.forget()
        if self._training:
            self._training.abandon()
        self.server.end()
        self.server.renew(self._experiment)
        self.server.wait()

    def _remember_peaks(self) -> None:
        """Keep the actors' peaks of memory for the plans of later runs.

        Not of actors that have served another run before: the peak may be of that.
        """
        if self._begun_again:
            return
        from fedlpp_ray.federation.peaks import remember_peaks  # takes seconds

        peaks = [slot.actor.peak.remote() for slot in self.pool.working]
        with suppress(RayError):
            server, *clients = ray.get([self.server.actor.peak.remote(), *peaks], timeout=10)
            remember_peaks(self._experiment, {"server": server, "client": max(clients)})

    def close(self) -> None:
        """End the actors."""
        self.server.end()
        self._on_nodes.close()
        if self._pool:
            self._pool.close()

    def _client_job(self, name: str, call: Callable[[Any], Any]) -> Answer:
        """Have any client actor answer a call."""
        answer, seconds = Answer(), self._evaluation_seconds
        failed = partial(answer.failed, name)
        answer.job = Job(name, lambda actor: [call(actor)], answer.arrived, failed, seconds)
        self.pool.submit(answer.job)
        return answer

    def _wait_for(self, answer: Answer) -> Any:
        """The answer; who is not done at the deadline is replaced, and it is asked for again."""
        while not self.pool.until(lambda: answer.there, self._deadline()):
            self.pool.hurry(answer.job, "not done before runtime.round_deadline")
        return answer.get()

    def _deadline(self) -> float:
        """Of what begins now, by `time.monotonic`."""
        limit = self._experiment.runtime.round_deadline
        return float("inf") if limit is None else time.monotonic() + limit

    def _for_client(self, client: int, made: int, broadcast: Broadcast) -> Any:
        """All editions, which clients share; or, where each has its own, that of one client."""
        if not self._experiment.downlink.individual:
            return self._stored(made, broadcast)
        key = edition(self._experiment, client)
        return {key: broadcast[key]}

    def _stored(self, made: int, broadcast: Broadcast) -> Any:
        """The broadcast in the object store: put once, whoever uses it and however long."""
        if self._put.get(made, (None,))[0] != broadcast:
            self._put[made] = (broadcast, ray.put(broadcast))
        return self._put[made][1]


def _part_of(server: Any, number: int) -> bytes:
    """A part of the base, from the server's actor.

    Raises:
        ServerGone: there is none any more.
    """
    try:
        return ray.get(server.call.remote("base_part", number))  # type: ignore[no-any-return]
    except RayTaskError:
        raise
    except RayError as error:
        raise ServerGone(str(error)) from error
