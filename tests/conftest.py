"""Fixtures that most tests share: a tiny model, tiny text, an experiment on them; and ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reached for the hub would hang, not fail
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
_CACHE = tempfile.TemporaryDirectory(prefix="fedlpp_ray-")  # of this session and its processes
os.environ["FEDLPP_RAY_CACHE"] = _CACHE.name

from fedlpp_ray.config import Experiment
from tests import tiny
from tests.ranks import Ranks


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    return


@pytest.fixture(scope="session", autouse=True)
def own_peaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is not remembered for the runs of whoever tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("peaks")
        patch.setattr("fedlpp_ray.federation.peaks.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def still_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which is another on each rank."""
    return tiny.make_model(tmp_path_factory.mktemp("still") / "model", dropout=0.0)


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_csv(tmp_path_factory.mktemp("tiny") / "data.csv", tiny.make_rows(400))


@pytest.fixture(scope="session")
def tiny_values(tiny_model: Path, tiny_csv: Path) -> dict[str, object]:
    """Dotted keys that make the default experiment tiny: seconds on one core."""
    return {
        "model.name": str(tiny_model),
        "task.name": "classification",
        "task.data": str(tiny_csv),
        "task.held_out": 80,
        "task.max_length": 16,
        "lora.rank": 4,
        "lora.alpha": 8,
        "client.lr": 1e-2,
        "client.batch_size": 8,
        "federation.clients": 8,
        "federation.client_fraction": 0.5,
        "federation.rounds": 3,
        "federation.local_steps": 4,
    }


@pytest.fixture(scope="session")
def tiny_experiment(tiny_values: dict[str, object]) -> Experiment:
    return Experiment().with_values(tiny_values)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks; those of a module's tests are the same processes."""
    with closing(Ranks(2, tmp_path_factory.mktemp("ranks"))) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four ranks, in the same way."""
    with closing(Ranks(4, tmp_path_factory.mktemp("ranks"))) as ranks:
        yield ranks
