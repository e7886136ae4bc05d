"""What client actors are given to do, and in which order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from fedlpp_ray.errors import UserError

Refs = Sequence[Any]
"""References to a job's results; the first is small, and says whether it succeeded."""


@dataclass(eq=False)
class Job:
    """A call of a client actor.

    Attributes:
        name: For messages.
        send: Actor to the references of the results.
        done: Is given the first result and the references of the others.
        failed: Is told why it was given up.
        seconds: Expected.
        attempts: How often it was lost with its actor.
        cancelled: Nobody waits for it any more.
    """

    name: str
    send: Callable[[Any], Refs]
    done: Callable[[Any, Refs], None]
    failed: Callable[[str], None]
    seconds: float = 0.0
    attempts: int = 0
    cancelled: bool = False

    def begin(self, actor: Any) -> Refs:
        """Send it."""
        return self.send(actor)


class LostError(UserError):
    """A job was lost with its actor in every attempt; another time it may succeed."""


class Answer:
    """The result of a job, once it is there."""

    job: Job

    def __init__(self) -> None:
        self._found: list[Any] = []

    @property
    def there(self) -> bool:
        """Whether it has come, or never will."""
        return bool(self._found)

    def arrived(self, result: Any, _: Refs) -> None:
        """Take it."""
        self._found.append(result)

    def failed(self, name: str, why: str) -> None:
        """Take the reason why there is none."""
        self._found.append(LostError(f"{name}: {why}"))

    def get(self) -> Any:
        """The result.

        Raises:
            LostError: there is none.
        """
        if isinstance(self._found[0], Exception):
            raise self._found[0]
        return self._found[0]


class Queue:
    """Jobs, the longest first: what is long must not begin last."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._number = count()

    def push(self, job: Job) -> None:
        """Add a job."""
        heapq.heappush(self._heap, (-job.seconds, next(self._number), job))

    def pop(self) -> Job | None:
        """Take the longest that someone still waits for."""
        while self._heap:
            job = heapq.heappop(self._heap)[2]
            if not job.cancelled:
                return job
        return None

    def __bool__(self) -> bool:
        return any(not job.cancelled for _, _, job in self._heap)


class Pace:
    """Expected seconds of a client's round, from its steps and an average of past times."""

    NEWEST = 0.3
    """Share of the newest time in an average."""

    def __init__(self, steps: Callable[[int], int]) -> None:
        self._steps = steps
        self._clients: dict[int, float] = {}
        self._any = 1.0

    def expected(self, client: int) -> float:
        """Seconds: of a client that is not known yet, as of any other by its steps."""
        return self._steps(client) * self._clients.get(client, self._any)

    def observe(self, client: int, seconds: float) -> None:
        """Take a client's time into the averages."""
        step = seconds / self._steps(client)
        self._any += self.NEWEST * (step - self._any)
        known = self._clients.get(client, step)
        self._clients[client] = known + self.NEWEST * (step - known)
