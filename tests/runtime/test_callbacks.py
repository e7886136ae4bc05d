"""What a sweep's driver says of trials: in MLflow, and on the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient
from rich.console import Console

from fedlpp_ray.config import Experiment
from fedlpp_ray.runtime.callbacks import MlflowCallback, ProgressCallback
from fedlpp_ray.runtime.variants import Variants

KEY = "lora.rank"


def trial_of(name: str, **words: str) -> Any:
    last = {"final/utility": 0.9, "protection": 0.25, "round": 3, **words}
    return SimpleNamespace(
        trial_id=name,
        last_result=last,
        checkpoint=None,
        config={KEY: 4},
        is_finished=lambda: False,
    )


def test_a_trials_run_is_tagged_with_whom_its_protection_is_against(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    callback = MlflowCallback(uri, "s", Variants(tiny_experiment, {}), [KEY], tmp_path / "a")
    callback.setup()
    words = {"threat": "somebody", "attack.threat": "somebody with more"}
    for trial in (trial_of("a", **words), trial_of("b")):
        callback.on_trial_complete(1, [], trial)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("s").experiment_id
    tags = {
        run.data.tags["fedlpp.trial"]: run.data.tags for run in client.search_runs([experiment])
    }
    assert words.items() <= tags["a"].items()
    assert not words.keys() & tags["b"].keys()


def test_a_threat_is_said_with_the_first_trial_that_has_it() -> None:
    callback = ProgressCallback(3, [KEY])
    callback.setup()
    callback._console = Console(file=io.StringIO(), soft_wrap=True)
    threats = ("somebody", "somebody", "others")
    for trial in (trial_of(str(i), threat=x) for i, x in enumerate(threats)):
        callback.on_trial_complete(1, [trial], trial)
    callback.on_experiment_end([])
    lines = callback._console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "threat", "trial", "trial", "threat"]
    assert lines[1] == "threat    somebody"
