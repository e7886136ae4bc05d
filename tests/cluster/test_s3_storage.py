"""A sweep with results in an S3-compatible store (moto), killed and begun again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aws_stand_in import aws
from botocore.config import Config
from mlflow import MlflowClient
from pyarrow.fs import FileSystem
from test_jobs import ROOT, SPACE

from fedlpp_ray.config import Experiment, dump_experiment

boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto.server", reason="needs moto[server] (extra cluster-tests)")
pytestmark = pytest.mark.long

ROUNDS = 12


@dataclass(frozen=True)
class Store:
    """A bucket at an endpoint."""

    endpoint: str

    @property
    def uri(self) -> str:
        """As docs/clusters.md has it."""
        return f"s3://bucket/sweeps?scheme=http&endpoint_override={self.endpoint}"

    def objects(self) -> dict[str, Any]:
        """When each object was last written."""
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="bucket")
        found = [each for page in pages for each in page.get("Contents", [])]
        return {each["Key"]: each["LastModified"] for each in found}

    def finished(self, round: int) -> list[str]:
        """Trials that have a checkpoint after this round."""
        end = f"/checkpoint_{round - 1:06d}/history.json"
        return sorted(key.split("/")[-3] for key in self.objects() if key.endswith(end))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with aws(monkeypatch) as endpoint:
        # The first answer takes long on a loaded machine, and a repeated request has its bucket.
        patient = Config(read_timeout=300, retries={"total_max_attempts": 1})
        boto3.client("s3", config=patient).create_bucket(Bucket="bucket")
        yield Store(endpoint)


@pytest.fixture
def folder(tmp_path: Path, tiny_experiment: Experiment) -> Path:
    values = {"federation.rounds": ROUNDS, "federation.local_steps": 40}
    tiny = tiny_experiment.with_values(values | {"runtime.client_actors": 1})
    (tmp_path / "tiny.yaml").write_text(dump_experiment(tiny, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    return tmp_path


def logged(folder: Path) -> dict[str, list[int]]:
    """Rounds that MLflow has of each run."""
    client = MlflowClient(f"sqlite:///{folder}/results/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name[:5] == "space"]
    return {
        run.info.run_id: [p.step for p in client.get_metric_history(run.info.run_id, "round")]
        for run in client.search_runs(experiments)
    }


def test_a_killed_sweep_goes_on_from_the_bucket_and_is_read_there(
    store: Store, folder: Path
) -> None:
    command = [sys.executable, "-m", "fedlpp_ray.tune", "space.py", "--storage", store.uri]
    environment = {k: v for k, v in os.environ.items() if k != "AWS_ENDPOINT_URL"}  # the URI has it
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:
        environment |= {"TUNE_GLOBAL_CHECKPOINT_S": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"RAY_TMPDIR": scratch}
        first = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 240
        while not store.finished(3):
            assert first.poll() is None, "the sweep ended"
            assert time.monotonic() < end, "no third round"
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        assert not store.finished(ROUNDS)
        before = logged(folder)
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    trials = store.finished(ROUNDS)
    assert len(trials) == 2
    after = logged(folder)
    assert before.keys() <= after.keys()  # the interrupted runs went on, and were not begun again
    assert list(after.values()) == [list(range(1, ROUNDS + 1))] * 2

    (table,) = (folder / "results").glob("space-*/sweep.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["trial"] for row in rows] == trials
    files, path = FileSystem.from_uri(store.uri)
    name = f"{path}/{table.parent.name}/{trials[0]}/checkpoint_{ROUNDS - 1:06d}/result.json"
    result = json.loads(files.open_input_file(name).read())
    assert len(result["history"]) == ROUNDS
    assert result["history"][-1]["server"]["accuracy"] == pytest.approx(
        float(rows[0]["server/accuracy"]), abs=1e-6
    )
