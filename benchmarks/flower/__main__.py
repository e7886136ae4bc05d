"""The same federations in Flower's simulation engine and here, side by side.

    python -m benchmarks.flower [--quick] [--only NAME] [--into FILE]

Model, data and their shares, cohort size, local steps, optimizer, batch size, precision, workers
and threads are the same. Flower's app is written as its documentation and examples have it: a
ClientApp that makes tokenizer, model and adapter for each client, FedAvg over the adapters, actors
of one CPU each. It runs in a virtual environment of its own, which the first call installs.

Both sides run in turn, several rounds at a time; a round is the median of all but the first of each
run, without start-up and evaluation. Flower's is the time between two calls of its `evaluate_fn`
(sampling, messages, training, aggregation); ours is `--json`'s total without the evaluation. The
arithmetic is a bare loop over the same steps, in as many processes at once as there are workers.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.flower import table
from benchmarks.flower.processes import install, run_arithmetic, run_flower, run_ours
from benchmarks.flower.settings import FLOWER, SETTINGS, WORKERS, Setting, app_config
from fedlpp_ray.errors import UserError

REPEATS = 1


class Comparison:
    """The runs of one setting on both sides.

    Args:
        setting: Which federation.
        python: Of Flower's environment.
        folder: An empty one, for files and logs.
        rounds: Measured rounds of each run.
    """

    def __init__(self, setting: Setting, python: Path, folder: Path, rounds: int) -> None:
        self.setting, self._python, self._folder = setting, python, folder
        self._rounds = 1 + rounds
        self._config = app_config(setting, self._rounds, folder)
        self._arithmetic: dict[str, float] = {}
        self._flower: list[float] = []
        self._clients: list[dict[str, Any]] = []
        self._ours: dict[str, list[float]] = {base: [] for base in setting.bases}
        self.versions: dict[str, str] = {}

    def run(self) -> None:
        """Run both sides once more; the first time, the arithmetic too."""
        if not self._arithmetic:
            self._note("arithmetic")
            self._arithmetic = run_arithmetic(self.setting, self._config, self._folder)
        self._note("Flower")
        found = run_flower(self._python, self._config, self._folder)
        self._flower += found["rounds"][1:]
        self._clients += found["clients"][1:]
        self.versions = found["versions"]
        for base in self.setting.bases:
            self._note(f"ours, {base}")
            self._ours[base] += run_ours(self.setting, base, self._rounds, self._folder)[1:]

    def _note(self, side: str) -> None:
        now = time.strftime("%H:%M:%S")
        print(f"{now} {self.setting.name}: {side} ...", file=sys.stderr, flush=True)

    def rows(self) -> list[table.Row]:
        """A row for each base of our clients."""
        return [
            table.Row(
                setting=self.setting.title,
                base=base,
                target=self.setting.target,
                workers=WORKERS,
                cohort=self._config["cohort"],
                flower=self._flower,
                ours=seconds,
                arithmetic=(self._arithmetic[FLOWER], self._arithmetic[base]),
            )
            for base, seconds in self._ours.items()
        ]

    def parts(self) -> dict[str, float]:
        """Where Flower's worker seconds go."""
        return table.flower_parts(self._flower, self._clients, WORKERS)


def markdown(comparisons: Sequence[Comparison], load: float) -> str:
    """Both tables, the versions, and the load average before the first run."""
    rows = [row for comparison in comparisons for row in comparison.rows()]
    parts = {comparison.setting.title: comparison.parts() for comparison in comparisons}
    packages = ", ".join(f"{name} {v}" for name, v in comparisons[0].versions.items())
    return "\n\n".join(
        [
            table.markdown(rows),
            table.parts_markdown(parts),
            f"Flower's environment: {packages}. {os.cpu_count()} cores, {platform.machine()}, "
            f"{WORKERS} workers with one thread each. Seconds per client are of one worker. "
            f"Load average before the first run: {load:.1f}; above 1, measure again.",
        ]
    )


def _options() -> argparse.Namespace:
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.flower")
    parser.add_argument("--only", choices=names, help="one setting alone")
    parser.add_argument("--quick", action="store_true", help="one run of two rounds: a smoke test")
    parser.add_argument("--into", type=Path, metavar="FILE", help="has the table between marks")
    return parser.parse_args()


def main() -> None:
    """Install, run both sides in turn, print."""
    options = _options()
    settings = [s for s in SETTINGS if options.only in (None, s.name)]
    python, load = install(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="benchmark-flower-") as root:
        comparisons = []
        for setting in settings:
            folder = Path(root) / setting.name
            folder.mkdir()
            rounds = 1 if options.quick else setting.rounds
            comparisons.append(Comparison(setting, python, folder, rounds))
        for _ in range(1 if options.quick else REPEATS):
            for comparison in comparisons:
                comparison.run()
        tables = markdown(comparisons, load)
        print(tables)
        if options.into:
            page.write(options.into, "benchmarks.flower", f"\n{tables}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
