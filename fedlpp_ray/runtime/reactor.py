"""Waiting for many remote results at once, in one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

Then = Callable[[Any], None]
"""Is given the reference whose result is there, or has failed."""


_SECONDS = 1.0


class Reactor:
    """Calls back for each result when it is there. Whoever waits for anything serves all."""

    def __init__(self) -> None:
        self._then: dict[Any, Then] = {}
        self._duties: list[Callable[[], None]] = []
        self._looked = time.monotonic()

    def when(self, reference: Any, then: Then) -> None:
        """Call `then` with the reference when it is ready."""
        self._then[reference] = then

    def regularly(self, duty: Callable[[], None]) -> None:
        """Do something every second while anyone waits."""
        self._duties.append(duty)

    def clear(self) -> None:
        """Wait for nothing any more."""
        self._then.clear()

    def until(self, condition: Callable[[], bool], deadline: float = float("inf")) -> bool:
        """Serve callbacks until a condition holds.

        Args:
            condition: Looked at after each callback, and every second.
            deadline: Of `time.monotonic`.

        Returns:
            Whether it holds; False once the deadline has passed.
        """
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._serve(min(left, _SECONDS))
            self._do_duties()
        return True

    def get(self, reference: Any) -> Any:
        """The result of one reference; others are served meanwhile."""
        found: list[Any] = []
        self.when(reference, found.append)
        self.until(lambda: bool(found))
        return ray.get(reference)

    def _do_duties(self) -> None:
        if time.monotonic() - self._looked >= _SECONDS:
            self._looked = time.monotonic()
            for duty in self._duties:
                duty()

    def _serve(self, seconds: float) -> None:
        if not self._then:
            time.sleep(min(seconds, 0.1))
            return
        ready, _ = ray.wait(list(self._then), timeout=seconds, fetch_local=False)
        for reference in ready:
            self._then.pop(reference)(reference)
