"""The client actors of a run: each pulls its next job, and any of them may be lost at any time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from fedlpp_ray.errors import UserError
from fedlpp_ray.messages import MessageError
from fedlpp_ray.runtime.jobs import Job, Queue, Refs
from fedlpp_ray.runtime.party import Place
from fedlpp_ray.runtime.placement import PlacementError
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.watch import draining, what_is_missing

logger = logging.getLogger(__name__)

_GIVES_WAY = "the run's reservation has lost a bundle, which comes first"
_SECONDS_TO_PLACE = 5.0
"""Seconds in which room that was made is used."""

Begin = Callable[["Slot"], tuple[Any, Any]]
"""A slot to its actor, a new one where it has none, and the reference of its start."""


@dataclass(eq=False)
class Slot:
    """One client actor, or the next one in its place.

    Attributes:
        number: Of the slot.
        actor: Its handle.
        state: `absent` where it was given up, or is not needed any more; `waiting` while it leaves
            room to the run's reservation.
        place: Where it runs, once it has started.
        job: What it does.
        starts: How often in a row it did not start.
        turn: Counts the starts, so that what belongs to an earlier one is known.
        room: What its share of a GPU is multiplied by, since others have made room for it.
    """

    number: int
    actor: Any = None
    state: Literal["starting", "idle", "busy", "waiting", "absent"] = "absent"
    place: Place | None = None
    job: Job | None = None
    starts: int = 0
    turn: int = 0
    room: float = 1.0


class Pool:
    """Actors that pull jobs.

    Args:
        reactor: Serves their results.
        begin: Starts an actor.
        size: Number of actors at most.
        reserved: So many of them, the first, have bundles of the run's reservation.
        whole: Whether all bundles of the reservation have their places.
        attempts: How often a job, or in a row the start of an actor, is tried.
        timeout: Seconds without any actor that works after which the pool gives up.
        needs: What one actor needs, in words.
        advise: Says what to do where memory is too small.

    Attributes:
        reactor: Serves their results.
        slots: The actors.
    """

    def __init__(
        self,
        reactor: Reactor,
        begin: Begin,
        *,
        size: int,
        reserved: int,
        whole: Callable[[], bool],
        attempts: int,
        timeout: float,
        needs: str,
        advise: Callable[[BaseException], str],
    ) -> None:
        self.reactor, self._begin = reactor, begin
        self._attempts, self._timeout, self._needs = attempts, timeout, needs
        self._advise = advise
        self._reserved, self._whole = reserved, whole
        self._made_room = 0.0
        self._last_fault = "none has started"
        self.slots = [Slot(number) for number in range(size)]
        self.begin()
        if size > reserved:
            reactor.regularly(self._mind_reservation)

    @property
    def working(self) -> list[Slot]:
        """The actors that have started."""
        return [slot for slot in self.slots if slot.state in ("idle", "busy")]

    def submit(self, job: Job) -> None:
        """Have a job done by whoever is free first."""
        self._queue.push(job)
        self._dispatch()

    def until(self, condition: Callable[[], bool], deadline: float = float("inf")) -> bool:
        """As `Reactor.until`.

        Raises:
            PlacementError: no actor has worked for the pool's timeout.
        """

        def over() -> bool:
            if condition():
                return True
            self._check_alive()
            draining()  # a node that is lost later is no longer among those that have notice
            self._dispatch()
            return False

        return self.reactor.until(over, deadline)

    def cancel(self, job: Job, why: str) -> None:
        """Do not wait for a job any longer; an actor that is at it is replaced."""
        job.cancelled = True
        for slot in self.slots:
            if slot.job is job:
                self._replace(slot, why)

    def hurry(self, job: Job, why: str) -> None:
        """Have a job begun again if an actor is at it, which is replaced."""
        for slot in self.slots:
            if slot.job is job:
                self._replace(slot, why)
                self.again(job, why)

    def forget(self) -> None:
        """Drop all jobs; actors that are at one finish it first."""
        self._queue = Queue()
        for slot in self.slots:
            if slot.job:
                slot.job.cancelled = True

    def begin(self) -> None:
        """Start the same actors with what they are to do next; whatever they did is void."""
        self._queue = Queue()
        self._packed_less: set[Place] = set()
        self._worked = time.monotonic()
        for slot in self.slots:
            slot.starts, slot.room = 0, 1.0
            self._start(slot)

    def close(self) -> None:
        """End the actors."""
        for slot in self.slots:
            self._end(slot)

    def _check_alive(self) -> None:
        if self.working:
            self._worked = time.monotonic()
        elif all(slot.state == "absent" for slot in self.slots):
            raise PlacementError(f"no client actor is left: {self._last_fault}")
        elif time.monotonic() - self._worked > self._timeout:
            raise PlacementError(
                f"no client actor has worked for {self._timeout:g} s (runtime.start_timeout); one "
                f"needs {self._needs}; {what_is_missing()}; last fault: {self._last_fault}"
            )

    def _mind_reservation(self) -> None:
        """Have actors without a bundle make room where the reservation lost one with its node.

        Ray places all bundles that it lacks together or none: a client's without room would keep
        the server's from being placed, too.
        """
        others = self.slots[self._reserved :]
        if self._whole():
            self._made_room = 0.0
            for slot in others:
                if slot.state == "waiting":
                    self._start(slot)
            return
        for slot in others:
            if slot.state == "starting" and slot.place is None:
                self._give_way(slot)
        if time.monotonic() - self._made_room > _SECONDS_TO_PLACE:
            self._made_room = time.monotonic()
            working = [slot for slot in others if slot in self.working]
            for slot in sorted(working, key=lambda slot: (slot.state, slot.number))[-1:]:
                self._give_way(slot)  # one that is idle, if there is one

    def _give_way(self, slot: Slot) -> None:
        job = slot.job
        self._replace(slot, _GIVES_WAY)
        if job:
            self.again(job, _GIVES_WAY, counts=False)

    def _start(self, slot: Slot) -> None:
        if slot.actor is None and slot.number >= self._reserved and not self._whole():
            slot.state = "waiting"
            return
        slot.state, slot.place, slot.job = "starting", None, None
        slot.turn += 1
        slot.actor, started = self._begin(slot)
        self.reactor.when(started, partial(self._started, slot, slot.turn))

    def _started(self, slot: Slot, turn: int, reference: Any) -> None:
        if slot.turn != turn:
            return
        try:
            slot.place = ray.get(reference)
        except RayError as error:
            if _is_out_of_memory(error):
                slot.place = getattr(getattr(error, "cause", None), "place", None)
                self._pack_less(slot, None, error)
                return
            if isinstance(error, UserError) or (
                isinstance(error, RayTaskError) and not is_loss(error) and not self.working
            ):
                raise  # the model or the data cannot be used: nor could another actor
            self._last_fault = in_words(error)
            slot.starts += not _is_blameless(error)
            self._end(slot)
            again = slot.starts < self._attempts
            what = "is started again" if again else "is given up"
            logger.warning("client actor %d %s: %s", slot.number, what, self._last_fault)
            if again:
                self._start(slot)
            return
        slot.state, slot.starts = "idle", 0
        self._dispatch()

    def _dispatch(self) -> None:
        """Give idle actors their next jobs; those on a node about to go only if all are there."""
        idle = [slot for slot in self.slots if slot.state == "idle"]
        if not idle or not self._queue:
            return
        leaving = draining()
        staying = [s for s in self.working if s.place and s.place.node not in leaving]
        for slot in idle:
            if staying and slot not in staying:
                continue
            job = self._queue.pop()
            if job is None:
                return
            slot.state, slot.job = "busy", job
            references = job.begin(slot.actor)
            finished = partial(self._finished, slot, slot.turn, job, references)
            self.reactor.when(references[0], finished)

    def _finished(self, slot: Slot, turn: int, job: Job, references: Refs, _: Any) -> None:
        if slot.turn != turn:
            return  # replaced meanwhile
        slot.state, slot.job = "idle", None
        try:
            result = ray.get(references[0])
        except MessageError as error:
            result = error
        except RayError as error:
            if _is_out_of_memory(error):
                self._pack_less(slot, job, error)
            elif is_loss(error):
                self._lost(slot, job, error)
            else:
                raise
            return
        self._dispatch()
        if not job.cancelled:
            job.done(result, references[1:])

    def _lost(self, slot: Slot, job: Job, error: RayError) -> None:
        noticed = slot.place is not None and slot.place.node in draining()
        self._replace(slot, in_words(error))
        self._probe()
        counts = not (noticed or _is_blameless(error))
        self.again(job, in_words(error), counts=counts)

    def _probe(self) -> None:
        """Have idle actors answer before they get a job: they may be lost for the same reason."""
        for slot in self.slots:
            if slot.state == "idle":
                slot.state, slot.turn = "starting", slot.turn + 1
                answered = partial(self._answered, slot, slot.turn)
                self.reactor.when(slot.actor.answer.remote(), answered)

    def _answered(self, slot: Slot, turn: int, reference: Any) -> None:
        if slot.turn != turn:
            return
        try:
            ray.get(reference)
        except RayError as error:
            self._replace(slot, in_words(error))
            return
        slot.state = "idle"
        self._dispatch()

    def again(self, job: Job, why: str, *, counts: bool = True) -> None:
        """Queue a job whose result is lost; give it up after the last attempt."""
        if job.cancelled:
            return
        job.attempts += counts
        if job.attempts < self._attempts:
            logger.warning("%s is begun again: %s", job.name, why)
            self._queue.push(job)
            self._dispatch()
        else:
            job.failed(f"lost in {job.attempts} attempts (runtime.attempts): {why}")

    def _replace(self, slot: Slot, why: str) -> None:
        self._last_fault = why
        logger.warning("client actor %d is replaced: %s", slot.number, why)
        self._end(slot)
        self._start(slot)

    def _pack_less(self, slot: Slot, job: Job | None, error: RayError) -> None:
        """Once, give half of the actors on a device the memory of all."""
        sharing = [slot, *(s for s in self.slots if s.place == slot.place and s is not slot)]
        name = job.name if job else f"client actor {slot.number}"
        if slot.place is None or slot.place in self._packed_less or len(sharing) < 2:
            advice = self._advise(getattr(error, "cause", None) or error)
            raise OutOfMemoryError(f"{name}, one of {len(sharing)} actors there: {advice}")
        self._packed_less.add(slot.place)
        kept = len(sharing) // 2
        logger.warning(
            "%s ran out of memory: %d actors instead of %d share this device from now on",
            *(name, kept, len(sharing)),
        )
        jobs = [each for each in (job, *(s.job for s in sharing)) if each]
        for number, other in enumerate(sharing):
            self._end(other)
            if number < kept:
                other.room *= len(sharing) / kept
                self._start(other)
        for each in jobs:
            self._queue.push(each)

    def _end(self, slot: Slot) -> None:
        if slot.state in ("idle", "busy"):
            self._worked = time.monotonic()
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.turn += 1
        slot.actor, slot.state, slot.place, slot.job = None, "absent", None, None


class OutOfMemoryError(UserError):
    """A client does not fit into the memory of its device."""


def is_loss(error: RayError) -> bool:
    """Whether something was lost that a call needed, rather than that the call failed by itself."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, RayError)


def _is_blameless(error: RayError) -> bool:
    """Whether the actor was taken away, or what it needed was, rather than that it failed."""
    cause = getattr(error, "cause", None)
    return getattr(error, "preempted", False) or getattr(cause, "preempted", False)


def _is_out_of_memory(error: RayError) -> bool:
    """Torch's own, of a GPU, or Ray's, whose monitor ends a process before the node runs out."""
    kinds = [*type(error).__mro__, *type(getattr(error, "cause", None)).__mro__]
    return any(kind.__name__ == "OutOfMemoryError" for kind in kinds)


def in_words(error: BaseException) -> str:
    """The first line of an error that says something."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
