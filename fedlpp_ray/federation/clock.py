"""Where the wall time of a round goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("broadcast", "train", "aggregate", "evaluate")


class Clock:
    """Wall time by phase since the last round was yielded; the rest of it is the caller's."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the block as one of `PHASES`."""
        start = time.perf_counter()
        yield
        self._phases[phase] += time.perf_counter() - start

    def seconds(self, busy: float) -> dict[str, float]:
        """Phases, what they leave of the total, and what the busiest host leaves; then from 0."""
        total = time.perf_counter() - self._start
        found = self._phases | {
            "record": total - sum(self._phases.values()),
            "overhead": max(0.0, total - busy),
            "total": total,
        }
        self._start, self._phases = time.perf_counter(), dict.fromkeys(PHASES, 0.0)
        return found
