"""A search over federated runs: `python -m fedlpp_ray.tune search_spaces/rank_bits.py`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedlpp_ray.command_line import check_writable_folder, run_command, without_secrets
from fedlpp_ray.errors import UserError

if TYPE_CHECKING:
    from fedlpp_ray.runtime.space import SearchSpace
    from fedlpp_ray.runtime.sweep import TrialOutcome
    from fedlpp_ray.tracking.mlflow_runs import Tracker


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if interrupted, or if no trial finished."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    return run_command(lambda: _tune(options, console), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedlpp_ray.tune",
        description="Search over federated runs with Ray Tune, logged to MLflow. The same command "
        "with the same storage goes on where an interrupted sweep ended.",
    )
    parser.add_argument("space", help="Python file that names base, param_space and objectives")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. lora.rank=4")
    parser.add_argument("--max-trials", type=int, metavar="N", help="run only the first N")
    parser.add_argument("--storage", default="results", metavar="DIR", help="folder or s3://...")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: SQLite in DIR")
    return parser


def _tune(options: argparse.Namespace, console: Console) -> int:
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # or Tune prints its own summary whatever we ask for
    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
    # These take seconds to import; --help and usage errors do not wait for them.
    from fedlpp_ray.federation import preflight
    from fedlpp_ray.runtime import connect
    from fedlpp_ray.runtime.callbacks import MlflowCallback, ProgressCallback
    from fedlpp_ray.runtime.plan import show_plan
    from fedlpp_ray.runtime.space import load_space
    from fedlpp_ray.runtime.sweep import run_sweep
    from fedlpp_ray.tracking.mlflow_runs import Tracker, default_uri

    space = load_space(options.space, options.overrides, options.max_trials)
    logging.getLogger("optuna").setLevel(logging.WARNING)  # after its import, which sets INFO
    remote = "://" in options.storage
    local = Path("results" if remote else options.storage).resolve()
    _check_storage(options.storage, local, remote=remote)
    preflight.check(space.drawn)
    uri = options.tracking_uri or default_uri(local)
    tracker = Tracker(uri, space.name, local / "mlartifacts")
    shown = without_secrets(options.storage)
    console.print(f"{space.name}: {space.total} trials, storage {shown}")
    progress = ProgressCallback(space.total, space.keys)
    log = MlflowCallback(uri, space.name, space.variants, space.keys, local / "mlartifacts")
    with connect(space.base.runtime):
        at_once = space.tune_config.max_concurrent_trials or space.total
        first = space.drawn[0]  # with what the space holds constant
        show_plan(first, console, most_trials=min(at_once, space.total))
        storage = options.storage if remote else str(local)
        outcomes = run_sweep(space, storage, [log, progress])
    if not outcomes:
        console.print("interrupted before any trial had a result: the same command goes on")
        return 1
    _show(space, outcomes, local / space.name, tracker, console)
    ends = [outcome.status for outcome in outcomes]
    if "unfinished" in ends or (space.trials and len(ends) < space.total):
        console.print("interrupted: the same command goes on")
        return 1
    return 0 if "finished" in ends else 1


def _check_storage(storage: str, local: Path, *, remote: bool) -> None:
    """Refuse a place that cannot be written, before anything is computed."""
    check_writable_folder("--storage", local)
    if remote:
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem

        try:
            FileSystem.from_uri(storage)
        except (ArrowException, OSError) as error:
            raise UserError(f"--storage {storage}: {error}") from error


def _show(
    space: SearchSpace,
    outcomes: list[TrialOutcome],
    folder: Path,
    tracker: Tracker,
    console: Console,
) -> None:
    from fedlpp_ray import report
    from fedlpp_ray.tracking.mlflow_runs import SWEEP_TAG, TRIAL_TAG

    folder.mkdir(parents=True, exist_ok=True)
    table = report.summarize(outcomes, space.keys, space.objectives)
    table.to_csv(folder / "sweep.csv", index=False)
    Console(width=168).print(report.console_table(table, space.keys))
    console.print(f"* not dominated in: {', '.join(space.objectives)}")
    for outcome in outcomes:
        if outcome.error:
            reason = outcome.error.strip().splitlines()[-1]
            console.print(f"trial {outcome.trial} failed: {reason}", markup=False)
    if any(outcome.status == "finished" for outcome in outcomes):
        report.save_plot(table, space.keys, space.base.utility, folder / "sweep.png")
        console.print(f"plot     {os.path.relpath(folder / 'sweep.png')}")
    console.print(f"table    {os.path.relpath(folder / 'sweep.csv')}")
    tags = [{SWEEP_TAG: space.name, TRIAL_TAG: outcome.trial} for outcome in outcomes]
    runs = [run for run in map(tracker.find, tags) if run]
    if tracker.ui_command:
        console.print(f"MLflow   {tracker.ui_command}")
    console.print(f"charts   {tracker.charts_link()}")
    console.print(f"compare  {tracker.compare_link(runs)}")


if __name__ == "__main__":
    sys.exit(main())
