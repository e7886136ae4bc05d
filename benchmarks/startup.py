"""The share of a trial's wall time that passes before its first round begins.

    python -m benchmarks.startup [--quick] [--into benchmarks/README.md]

The first four trials of `search_spaces/rank_bits.py`, the shipped sweep, as it is. The first trials
begin when Tune does: their start-up has Tune's own, the start of processes and all imports. A later
trial begins where the one before it in its process ends, and has that one's actors. A first round
begins where the run's clock does. A trial ends with its last report, which has its floor.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ray.tune import Callback

from benchmarks import page
from fedlpp_ray.federation import preflight
from fedlpp_ray.runtime import connect
from fedlpp_ray.runtime.space import load_space
from fedlpp_ray.runtime.sweep import run_sweep

NAME = "benchmarks.startup"
SPACE = "search_spaces/rank_bits.py"
TRIALS = 4
TARGET = 0.2
QUICK = ("federation.rounds=2", "federation.local_steps=1", "task.held_out=20")


@dataclass(frozen=True)
class Report:
    """One report of a trial.

    Attributes:
        trial: Its id.
        process: In which it runs.
        at: When the report came, seconds on any clock.
        took: Seconds of the round that it is of.
    """

    trial: str
    process: object
    at: float
    took: float


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        trial: Its id.
        first: Whether no trial ran in its process before.
        start_up: Seconds before its first round.
        wall: Seconds in all.
    """

    trial: str
    first: bool
    start_up: float
    wall: float

    @property
    def share(self) -> float:
        """Of the wall time that is start-up."""
        return self.start_up / self.wall


class Clock(Callback):  # type: ignore[misc]
    """Notes when trials report.

    Attributes:
        reports: All of them, in order.
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def on_trial_result(self, **info: Any) -> None:
        """Tune's hook."""
        result, trial = info["result"], info["trial"]
        process = result["node_ip"], result["pid"]
        took = result["seconds/total"]
        self.reports.append(Report(trial.trial_id, process, time.perf_counter(), took))


def trials(reports: Sequence[Report], begin: float) -> list[Row]:
    """What the reports of a sweep say of each trial.

    Args:
        reports: In the order in which they came.
        begin: When the sweep began.
    """
    found: list[Row] = []
    ended: dict[object, float] = {}
    for trial in dict.fromkeys(report.trial for report in reports):
        own = [report for report in reports if report.trial == trial]
        first, last = own[0], own[-1]
        start = ended.get(first.process, begin)
        row = Row(
            trial,
            first=first.process not in ended,
            start_up=first.at - first.took - start,
            wall=last.at - start,
        )
        found.append(row)
        ended[first.process] = last.at
    return found


def measure(keys: Sequence[str]) -> list[Row]:
    """Run the sweep in a private cluster."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    space, clock = load_space(SPACE, keys, TRIALS), Clock()
    preflight.check(space.drawn)
    with tempfile.TemporaryDirectory() as storage, connect(space.base.runtime):
        begin = time.perf_counter()
        outcomes = run_sweep(space, storage, [clock])
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        sys.exit(f"error: a trial failed: {errors[0]}")
    return trials(clock.reports, begin)


def markdown(rows: Sequence[Row]) -> str:
    """A row a trial, and the mean of the shares."""
    columns = ["trial", "its process", "start-up, s", "wall, s", "share", "target"]
    cells = [
        [
            str(number),
            "new" if row.first else "has run one before",
            f"{row.start_up:.1f}",
            f"{row.wall:.1f}",
            f"**{row.share:.1%}**",
            f"under {TARGET:.0%}",
        ]
        for number, row in enumerate(rows, start=1)
    ]
    of_all = sum(row.start_up for row in rows) / sum(row.wall for row in rows)
    later = [row.share for row in rows if not row.first]
    said = f" Of trials in a process that has run one: {mean(later):.1%}." if later else ""
    return f"{page.rows(columns, cells)}\n\nOf all trials' wall time: **{of_all:.1%}**.{said}"


def main() -> None:
    """Measure, print, write."""
    options = page.parser(NAME, __doc__).parse_args()
    page.deliver(NAME, options, lambda: markdown(measure(QUICK if options.quick else ())))


if __name__ == "__main__":
    main()
