"""A sweep whose driver was killed: the same command finishes it, and nothing is logged twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fedlpp_ray.config import Experiment, dump_experiment

ROUNDS = 12
SPACE = """
from ray import tune

base = "tiny.yaml"
param_space = {"downlink.bits": tune.grid_search([2, 4]), "runtime.client_actors": 1}
objectives = {"server/accuracy": "max"}
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, tiny_experiment: Experiment) -> None:
    values = {"federation.rounds": ROUNDS, "federation.local_steps": 40}
    experiment = tiny_experiment.with_values(values)
    (tmp_path / "tiny.yaml").write_text(dump_experiment(experiment, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    command = [sys.executable, "-m", "fedlpp_ray.tune", "space.py", "--storage", "out"]
    environment = os.environ | {"TUNE_GLOBAL_CHECKPOINT_S": "1"}
    first = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_round(tmp_path / "out", 4)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = rounds_logged(tmp_path / "out")
    assert 0 < sum(map(len, before.values())) < 2 * ROUNDS
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = rounds_logged(tmp_path / "out")
    assert set(before) <= set(after)  # the interrupted runs were continued, not begun again
    assert list(after.values()) == [list(range(1, ROUNDS + 1))] * 2


def runs(storage: Path) -> tuple[MlflowClient, list]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiments = [e for e in client.search_experiments() if e.name.startswith("space-")]
    return client, client.search_runs([e.experiment_id for e in experiments])


def rounds_logged(storage: Path) -> dict[str, list[int]]:
    client, found = runs(storage)
    return {
        run.info.run_id: [p.step for p in client.get_metric_history(run.info.run_id, "round")]
        for run in found
    }


def wait_for_round(storage: Path, wanted: int) -> None:
    """By the checkpoints: MLflow's new database must not be opened while it is being made."""
    for _ in range(1500):
        if any(storage.glob(f"space-*/*/checkpoint_{wanted - 1:06d}/history.json")):
            return
        time.sleep(0.2)
    raise AssertionError(f"no trial finished round {wanted}")
