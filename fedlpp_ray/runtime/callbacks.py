"""What the sweep's driver does at each report of a trial: log it, and show it.

Both callbacks make their connections in `setup` and hold only plain values before, because Tune
pickles them: a restored sweep goes on with the callbacks that it was started with.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlpp_ray.command_line import without_secrets
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.checkpoint import read_history
from fedlpp_ray.runtime.placement import PlacementError
from fedlpp_ray.runtime.variants import Variants
from fedlpp_ray.runtime.watch import what_is_missing
from fedlpp_ray.tracking.metrics import (
    ATTACK_THREAT,
    FINAL_UTILITY,
    PROTECTION,
    ROUND,
    SERVER_UTILITY,
    THREAT,
    named_values,
    reported,
    round_metrics,
)

PICTURE = "labels.png"
"""Name of the artifact that shows the label distribution of the clients."""

logger = logging.getLogger(__name__)


class MlflowCallback(Callback):
    """One flat MLflow run a trial, found again by its tags when a sweep is restored.

    A tracking store that fails in mid-sweep costs its log, not the sweep.

    Args:
        uri: Tracking URI.
        sweep: Name of the sweep, its MLflow experiment.
        variants: The experiments of trials.
        keys: The searched keys, which name the runs.
        artifacts: Folder for artifacts where the store is SQLite.
    """

    def __init__(
        self, uri: str, sweep: str, variants: Variants, keys: list[str], artifacts: Path
    ) -> None:
        self._uri, self._sweep, self._variants = uri, sweep, variants
        self._keys, self._artifacts = keys, artifacts
        self._tracker: Any = None
        self._runs: dict[str, str] = {}

    def setup(self, *_: Any, **__: Any) -> None:
        """Connect."""
        from fedlpp_ray.tracking.mlflow_runs import Tracker

        self._tracker = Tracker(self._uri, self._sweep, self._artifacts)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """Log one round."""
        self._try(lambda: self._log(trial, reported(result)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Add the artifacts and end the run."""
        self._try(lambda: self._close(trial, "FINISHED"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """End the run as failed, with what there is."""
        self._try(lambda: self._close(trial, "FAILED"))

    def _log(self, trial: Any, metrics: Mapping[str, float]) -> None:
        run = self._run(trial)
        first, last = self._tracker.last_round(run) + 1, int(metrics[ROUND])
        if first < last and trial.checkpoint:
            # A driver that was killed had not yet logged what its trial had already reported.
            with trial.checkpoint.as_directory() as folder:
                history = read_history(Path(folder))
            for number in range(first, min(last - 1, len(history)) + 1):
                self._tracker.log_round(run, round_metrics(history[:number]))
        self._tracker.log_round(run, metrics)

    def _run(self, trial: Any) -> str:
        if trial.trial_id not in self._runs:
            from fedlpp_ray.tracking.mlflow_runs import SWEEP_TAG, TRIAL_TAG

            experiment = self._variants.experiment(trial.config)
            config = experiment.model_dump(mode="json")
            tags = {SWEEP_TAG: self._sweep, TRIAL_TAG: trial.trial_id}
            name = named_values(trial.config, self._keys)
            run = self._runs[trial.trial_id] = self._tracker.open(name, config, tags)
            self._try(lambda: self._draw(run, experiment))
        return self._runs[trial.trial_id]

    def _draw(self, run: str, experiment: Experiment) -> None:
        """Add the picture of how labels lie at the clients."""
        from fedlpp_ray.tasks.picture import experiment_picture

        self._tracker.client.log_figure(run, experiment_picture(experiment), PICTURE)

    def _close(self, trial: Any, status: Literal["FINISHED", "FAILED"]) -> None:
        with ExitStack() as stack:
            folder = None
            if trial.checkpoint:
                folder = Path(stack.enter_context(trial.checkpoint.as_directory()))
            last = trial.last_result or {}
            tags = {key: last[key] for key in (THREAT, ATTACK_THREAT) if key in last}
            self._tracker.close(self._run(trial), status, folder, tags)

    @staticmethod
    def _try(action: Any) -> None:
        try:
            action()
        except Exception as error:
            logger.warning("not logged to MLflow: %s", without_secrets(str(error)))


class PlacementCallback(Callback):
    """Ends a sweep in which no trial gets the resources that it has to reserve.

    Args:
        timeout: Seconds without a running trial.
        needed: What a trial reserves, in words.
    """

    def __init__(self, timeout: float, needed: str) -> None:
        self._timeout, self._needed = timeout, needed
        self._ran = math.inf

    def setup(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._ran = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Look whether a trial runs.

        Raises:
            PlacementError: none has for the timeout.
        """
        waiting = [trial for trial in trials if trial.status == Trial.PENDING]
        if not waiting or any(trial.status == Trial.RUNNING for trial in trials):
            self._ran = time.monotonic()
        elif time.monotonic() - self._ran > self._timeout:
            raise PlacementError(
                f"no trial has got its resources for {self._timeout:g} s (runtime.start_timeout); "
                f"one needs {self._needed}; {what_is_missing()}. The same command goes on"
            )


class ProgressCallback(Callback):
    """A bar for a person, and a line for each trial that ends.

    Args:
        total: Number of trials.
        keys: The searched keys, shown with each trial.
    """

    def __init__(self, total: int, keys: list[str]) -> None:
        self._total, self._keys = total, keys
        self._console: Any = None
        self._bar: Any = None
        self._threats: set[str] = set()

    def setup(self, *_: Any, **__: Any) -> None:
        """Start the bar."""
        self._console = Console(stderr=True, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("trials"))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("trials", total=self._total)
        self._bar.start()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Show a finished trial, and against whom protection is where no trial before had that."""
        metrics = reported(trial.last_result or {})
        shown = []
        server = metrics.get(FINAL_UTILITY, metrics.get(SERVER_UTILITY))
        if server is not None:
            shown.append(f"server {server:.3f}")
        if PROTECTION in metrics:
            value = metrics[PROTECTION]
            shown.append(f"protection {'undefined' if math.isnan(value) else f'{value:+.3f}'}")
        else:
            shown.append(f"stopped after round {metrics.get(ROUND, 0):.0f}")
        self._line(trials, trial, "  ".join(shown))
        threat = (trial.last_result or {}).get(THREAT)
        if threat and threat not in self._threats:
            self._threats.add(threat)
            self._console.print(f"threat    {threat}", highlight=False, markup=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Show a failed trial."""
        self._line(trials, trial, f"failed, see {trial.error_file}")

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """End the bar."""
        self._bar.stop()

    def _line(self, trials: list[Any], trial: Any, text: str) -> None:
        ended = 1 + sum(other.is_finished() for other in trials if other is not trial)
        self._bar.update(self._task, completed=ended)
        searched = named_values(trial.config, self._keys)
        self._console.print(f"trial {ended}/{self._total}  {searched}  {text}", highlight=False)
