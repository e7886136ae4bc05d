"""Every method of configs/methods on the embedded default, side by side.

    python -m benchmarks.methods [--seeds N] [--into FILE] [NAME ...]

Each configuration is run with each seed, in this process, and evaluated after rounds 5 and 10. A
row is the mean over the seeds, and `server` has the standard deviation over them behind it. What
fails keeps its row, with the reason.
Seconds are those that one processor core worked on the run, start and floor included.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks import page
from fedlpp_ray.config import Experiment, load_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import in_process
from fedlpp_ray.federation.results import result
from fedlpp_ray.tracking.metrics import final_metrics, round_metrics

CONFIGS = Path(__file__).parents[1] / "configs" / "methods"
NAME = "benchmarks.methods"
HALFWAY = "evaluation.every=5"
SECONDS = "seconds/processor"
COLUMNS = {
    "server": "server/utility",
    "client before": "client_before/utility",
    "client after": "client_after/utility",
    "strongest client": "strongest_client",
    "floor": "floor",
    "MB down": "bytes/down",
    "MB up": "bytes/up",
    "seconds": SECONDS,
}


def measure(names: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """One row a configuration: `method`, lists of each column over the seeds, or `error`."""
    rows = []
    for name in names:
        try:
            found = [
                _run(load_experiment(CONFIGS / f"{name}.yaml", [f"seed={s}", HALFWAY]))
                for s in range(seeds)
            ]
            row: dict[str, Any] = {
                key: [f.get(metric) for f in found] for key, metric in COLUMNS.items()
            }
        except Exception as error:  # a method that fails is a finding
            row = {"error": f"{type(error).__name__}: {error}"}
        rows.append({"method": name, **row})
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def _run(experiment: Experiment) -> dict[str, float]:
    start = time.process_time()
    backend = in_process(experiment)
    history = list(Federation(experiment, backend).run())
    outcome = result(experiment, history, backend.measure_floor())
    metrics = round_metrics(history) | final_metrics(outcome)
    return metrics | {SECONDS: time.process_time() - start}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `measure` as a table."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [row["error"]] if "error" in row else [_cell(key, row[key]) for key in COLUMNS]
        link = f"[`{row['method']}`](configs/methods/{row['method']}.yaml)"
        lines.append(f"| {link} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(column: str, values: list[float | None]) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "-"
    if column.startswith("MB"):
        return f"{mean(known) / 1e6:.2f}"
    if column == "seconds":
        return f"{mean(known):.0f}"
    spread = f" ± {stdev(known):.3f}" if column == "server" and len(known) > 1 else ""
    return f"{mean(known):.3f}{spread}"


def main() -> None:
    """Run, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.methods")
    parser.add_argument("names", nargs="*", default=sorted(p.stem for p in CONFIGS.glob("*.yaml")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--into", type=Path, help="a page that has the table between marks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    table = markdown(measure(options.names, options.seeds))
    if options.into:
        page.write(options.into, NAME, table)
    print(f"\n{table}")


if __name__ == "__main__":
    main()
