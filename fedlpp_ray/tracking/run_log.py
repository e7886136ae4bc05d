"""One run of the command line in MLflow, as a sweep logs each of its trials.

It is found again by a tag, so that a run that goes on continues its log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fedlpp_ray.command_line import without_secrets
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.checkpoint import ADAPTER, FINAL
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.storage import RunFolder
from fedlpp_ray.storage.runs import LEAK_CURVE, RESULT
from fedlpp_ray.tracking.metrics import (
    attack_metrics,
    final_metrics,
    probe_metrics,
    round_metrics,
    threats,
)
from fedlpp_ray.tracking.mlflow_runs import Tracker

EXPERIMENT_NAME, RUN_TAG = "train", "fedlpp.run"
ARTIFACTS = "mlartifacts"
ATTACKS, PROBES = "attacks", "probes"
"""Prefixes of the tags that say who attacked, and who looked at updates."""

logger = logging.getLogger(__name__)


class RunLog:
    """The MLflow run of a run's folder. A store that fails later costs the log, not the run.

    Args:
        uri: Tracking URI.
        experiment: What is run.
        folder: Its folder; where the store is SQLite, artifacts go beside it.
        held: A block that no signal cuts in two: a transaction that is would lock the store.

    Raises:
        TrackingError: the store cannot be used.
    """

    def __init__(
        self,
        uri: str,
        experiment: Experiment,
        folder: RunFolder,
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._folder, self._held = folder, held
        self._tracker = Tracker(uri, EXPERIMENT_NAME, folder.path.parent / ARTIFACTS)
        self._tags = {RUN_TAG: folder.run_id()}
        self._config = experiment.model_dump(mode="json")
        self._run_id = ""

    @contextmanager
    def open(self) -> Iterator[None]:
        """The run for the time of the block: what ends the block early is its status."""
        self._try(self._open)
        try:
            yield
        except KeyboardInterrupt:
            self._try(lambda: self._tracker.close(self._run(), "KILLED"))
            raise
        except BaseException:
            self._try(lambda: self._tracker.close(self._run(), "FAILED"))
            raise

    def rounds(self, history: Sequence[RoundRecord]) -> None:
        """Log the rounds that are not there yet, each in one batch at its own step."""
        self._try(lambda: self._rounds(history))

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """End the run of a result, with what only a finished run has, and with its files."""
        self._try(lambda: self._finish(outcome))

    def attacked(self, report: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Log what attacks on the finished run came to, and the files that say more."""
        # The parameters are those of the run, which may be attacked under another threat model.
        values = {f"{ATTACKS}.adversary.{key}": str(x) for key, x in report["adversary"].items()}
        tags = {f"{ATTACKS}.threat": str(report["threat"])} | values
        self._try(lambda: self._afterwards(attack_metrics(report), files, tags))

    def probed(self, report: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Log what the finished run's updates gave away, and the files that say more."""
        tags = {f"{PROBES}.threat": str(report["threat"])}
        self._try(lambda: self._afterwards(probe_metrics(report), files, tags))

    def _afterwards(
        self,
        by_round: Mapping[int, Mapping[str, float | None]],
        files: Sequence[Path],
        tags: Mapping[str, str],
    ) -> None:
        run_id = self._run()
        for step, metrics in by_round.items():
            self._tracker.log(run_id, metrics, step)
        for path in files:
            self._tracker.client.log_artifact(run_id, str(path))
        self._tracker.close(run_id, "FINISHED", tags=tags)

    def _open(self) -> None:
        self._run_id = self._tracker.open(self._folder.path.name, self._config, self._tags)

    def _run(self) -> str:
        if not self._run_id:  # the store failed before
            self._open()
        return self._run_id

    def _rounds(self, history: Sequence[RoundRecord]) -> None:
        first = self._tracker.last_round(self._run()) + 1
        for number in range(first, len(history) + 1):
            self._tracker.log_round(self._run(), round_metrics(history[:number]))

    def _finish(self, outcome: Mapping[str, Any]) -> None:
        history = [RoundRecord.from_dict(record) for record in outcome["history"]]
        self._rounds(history)
        self._tracker.log_final(self._run(), final_metrics(outcome), history[-1].round)
        self._tracker.client.log_artifact(self._run(), str(self._folder.path / RESULT))
        if (curve := self._folder.path / LEAK_CURVE).exists():
            self._tracker.client.log_artifact(self._run(), str(curve))
        if checkpoint := self._folder.latest():
            self._log_files(checkpoint)
        self._tracker.close(self._run(), "FINISHED", tags=threats(outcome))

    def _log_files(self, checkpoint: Path) -> None:
        """The adapter that the server ends with, and what repeats the run.

        What clients keep is not logged.
        """
        adapter = FINAL if (checkpoint / FINAL).is_dir() else ADAPTER
        for path in checkpoint.iterdir():
            if path.name == adapter:
                self._tracker.client.log_artifacts(self._run(), str(path), ADAPTER)
            elif path.name in ("experiment.yaml", "history.json"):
                self._tracker.client.log_artifact(self._run(), str(path))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            with self._held():
                action()
        except Exception as error:
            logger.warning("not logged to MLflow: %s", without_secrets(str(error)))
