"""Federated runs in MLflow: one flat run each, one batch of metrics a round.

Flat, because the MLflow UI draws nothing for child runs until a person expands them. One batch a
round, because each call to the tracking server costs tens of milliseconds. The client is used,
never the module's active run, which is global to the process.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A store that is gone must not hold up a sweep for minutes at every report.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from fedlpp_ray.command_line import without_secrets
from fedlpp_ray.config import flat_config
from fedlpp_ray.errors import UserError
from fedlpp_ray.tracking.metrics import ROUND

SWEEP_TAG, TRIAL_TAG = "fedlpp.sweep", "fedlpp.trial"
UI = "http://127.0.0.1:5000"


def default_uri(storage: Path) -> str:
    """An SQLite store in `storage`, by absolute path: MLflow's own default follows the cwd."""
    storage.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(storage / 'mlflow.db').resolve()}"


class TrackingError(UserError):
    """The tracking store cannot be used."""


class Tracker:
    """The runs of one MLflow experiment.

    Args:
        uri: Tracking URI: a server's, or sqlite:///ABSOLUTE/PATH.
        experiment: Name of the MLflow experiment; made if it is new.
        artifacts: Folder for artifacts of a new experiment where the store is SQLite.

    Raises:
        TrackingError: the store cannot be used.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path) -> None:
        self.uri = uri
        location = artifacts.resolve().as_uri() if uri.startswith("sqlite:") else None
        try:
            self.client = MlflowClient(tracking_uri=uri)
            known = self.client.get_experiment_by_name(experiment)
            self.experiment_id: str = (
                known.experiment_id
                if known
                else self.client.create_experiment(experiment, artifact_location=location)
            )
        except MlflowException as error:
            raise TrackingError(f"MLflow at '{uri}': {error}") from error

    def open(self, name: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """A run for `name`: the one that has `tags` already, or else a new one.

        Args:
            name: The run's name.
            config: The experiment's plain values; logged as parameters of a new run.
            tags: What identifies the run.

        Returns:
            The run's id.
        """
        if run_id := self.find(tags):
            self.client.update_run(run_id, status="RUNNING")
            return run_id
        run = self.client.create_run(self.experiment_id, tags=dict(tags), run_name=name)
        values = flat_config(config).items()
        params = [Param(key, without_secrets(str(value))) for key, value in values]
        self.client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def find(self, tags: Mapping[str, str]) -> str | None:
        """The id of the run that has all of `tags`, if there is one."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs = self.client.search_runs([self.experiment_id], query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def log_round(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """One batch at the step of the metrics' round; a round logged before is left alone.

        Undefined values are left out.
        """
        step = int(metrics[ROUND])
        if step > self.last_round(run_id):
            self.log(run_id, metrics, step)

    def log_final(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """One batch of what only a finished run has; a run that has some of it is left alone."""
        if not self.client.get_run(run_id).data.metrics.keys() & metrics.keys():
            self.log(run_id, metrics, step)

    def log(self, run_id: str, metrics: Mapping[str, float | None], step: int) -> None:
        """One batch; what is undefined (None in a result that was read) is left out."""
        now = int(time.time() * 1000)
        batch = [
            Metric(key, value, now, step)
            for key, value in metrics.items()
            if value is not None and not math.isnan(value)
        ]
        self.client.log_batch(run_id, metrics=batch)

    def last_round(self, run_id: str) -> int:
        """The last round that was logged, or 0."""
        return int(self.client.get_run(run_id).data.metrics.get(ROUND, 0))

    def close(
        self,
        run_id: str,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        artifacts: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """End a run with its status, artifacts and last tags."""
        self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in (tags or {}).items()])
        if artifacts is not None:
            self.client.log_artifacts(run_id, str(artifacts))
        self.client.set_terminated(run_id, status)

    def compare_link(self, run_ids: list[str]) -> str:
        """Address of the UI's comparison of these runs."""
        quoted = ",".join(f'"{run_id}"' for run_id in run_ids)
        query = urlencode(
            {"runs": f"[{quoted}]", "experiments": f'["{self.experiment_id}"]'}, quote_via=quote
        )
        return f"{self.ui}/#/compare-runs?{query}"

    def charts_link(self) -> str:
        """Address of the UI's charts of the experiment."""
        return f"{self.ui}/#/experiments/{self.experiment_id}/runs?compareRunsMode=CHART"

    @property
    def ui(self) -> str:
        """Address of the UI: the tracking server's own, or where `ui_command` will start one."""
        return without_secrets(self.uri.rstrip("/")) if self.uri.startswith("http") else UI

    @property
    def ui_command(self) -> str | None:
        """The command that starts the UI, or None where a tracking server has it already."""
        if self.uri.startswith("http"):
            return None
        store = without_secrets(self.uri)
        return f"mlflow ui --backend-store-uri {store} --host 127.0.0.1 --port 5000"
