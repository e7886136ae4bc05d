"""A trial that is started again: from which checkpoint, and when not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune

from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, checkpoint
from fedlpp_ray.federation.in_process import in_process
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.privacy.attacks import find_attacks
from fedlpp_ray.runtime import connect, trial
from fedlpp_ray.runtime.space import load_space
from fedlpp_ray.runtime.sweep import run_sweep
from fedlpp_ray.storage import DamagedError


def test_a_torn_checkpoint_of_a_trial_is_passed_over(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    values = {"uplink.bits": 4, "uplink.error_feedback": True}  # clients keep something
    experiment = tiny_experiment.with_values(values)
    backend = in_process(experiment)
    federation = Federation(experiment, backend)
    folders = [tmp_path / f"checkpoint_{i:06d}" for i in range(3)]
    for folder, _ in zip(folders, federation.run(), strict=True):
        folder.mkdir()
        checkpoint.save(federation, folder)
    newest = tune.Checkpoint(str(folders[1]))  # as far as Tune knows; the third was not reported
    for expected, torn in ((2, "clients/*"), (1, "adapter/adapter_model.safetensors")):
        restored = Federation(experiment, backend)
        trial.restore_newest(restored, newest)
        assert len(restored.history) == expected
        (first, *_) = sorted(folders[expected - 1].glob(torn))
        first.unlink()  # other checkpoints have the same file
        first.write_bytes(b"torn")
    with pytest.raises(DamagedError, match="none of its checkpoints is whole"):
        trial.restore_newest(restored, newest)


def test_what_the_user_must_mend_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["1"]
    context = SimpleNamespace(get_job_id=lambda: job[0], get_node_id=lambda: "n")
    monkeypatch.setattr(trial.ray, "get_runtime_context", lambda: context)
    place = SimpleNamespace(get_trial_dir=lambda: str(tmp_path))
    monkeypatch.setattr(trial.tune, "get_context", lambda: place)
    tried: list[str] = []

    def run(error: type[Exception]) -> None:
        with trial._refused_once():
            tried.append(job[0])
            raise error("a reason")

    for _ in range(2):  # a lost process is worth another try
        with pytest.raises(RuntimeError):
            run(RuntimeError)
    for _ in range(3):
        with pytest.raises(UserError, match="a reason"):
            run(UserError)
    assert tried == ["1"] * 3
    job[0] = "2"  # the same sweep, started again by a user who may have mended it
    with pytest.raises(UserError, match="a reason"):
        run(UserError)
    assert tried[3:] == ["2"]


def test_a_trial_that_was_started_again_attacks_all_that_it_has_sent(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its second report; each start finds what the last one has reported."""
    values = {"federation.local_steps": 1, "adversary.watch": []}
    experiment = tiny_experiment.with_values(values | {"adversary.at_end": ["mean-factors"]})
    folders: list[Path] = []
    reports: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], checkpoint: tune.Checkpoint) -> None:
        folder = tmp_path / f"checkpoint_{len(folders):06d}"
        shutil.copytree(checkpoint.path, folder)
        folders.append(folder)
        reports.append(metrics)
        if len(folders) == 2:
            raise KeyboardInterrupt

    newest = lambda: tune.Checkpoint(str(folders[-1])) if folders else None  # noqa: E731
    monkeypatch.setattr(trial.tune, "report", report)
    monkeypatch.setattr(trial.tune, "get_checkpoint", newest)
    monkeypatch.setattr(trial, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(trial, "warm_backend", lambda *_: nullcontext(in_process(experiment)))
    with pytest.raises(KeyboardInterrupt):
        trial._run(experiment)
    trial._run(experiment)
    assert [each["round"] for each in reports] == [1, 2, 3]
    (found,) = json.loads((folders[-1] / trial.RESULT).read_text())["ladder"]["attacks"]
    sent: dict[int, Any] = {}
    whole = Federation(experiment, in_process(experiment), sent.__setitem__)
    list(whole.run())
    (expected,) = Ladder(experiment, sent, whole.history).run(find_attacks(["mean-factors"]))
    assert (found["broadcasts"], found["metrics"]) == (4, expected.metrics)
    assert reports[-1]["attack/mean-factors"] == expected.utility
    assert reports[-1]["attack/strongest"] == expected.utility
    outcome = json.loads((folders[-1] / trial.RESULT).read_text())
    assert reports[-1]["threat"] == outcome["threat"]
    assert reports[-1]["attack.threat"] == outcome["ladder"]["threat"]
    assert "threat" not in reports[1]


SPACE = """
from ray import tune

base = "tiny.yaml"
param_space = {"downlink.bits": tune.grid_search([4]), "runtime.client_actors": 1}
objectives = {"server/accuracy": "max"}
"""


class KillParties(tune.Callback):
    """Kills the processes of a trial's parties once it has reported its second round."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def on_trial_result(self, *_: Any, result: dict[str, Any], **__: Any) -> None:
        self.rounds.append(int(result["round"]))
        if self.rounds == [1, 2]:
            for actor in ray._private.state.actors().values():
                if actor["State"] == "ALIVE" and "Party" in actor["ActorClassName"]:
                    os.kill(actor["Pid"], signal.SIGKILL)


@pytest.mark.slow
def test_a_trial_whose_actors_are_killed_goes_on_from_its_last_checkpoint(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    experiment = tiny_experiment.with_values(
        {"federation.rounds": 12, "federation.local_steps": 20}
    )
    (tmp_path / "tiny.yaml").write_text(dump_experiment(experiment, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    killer = KillParties()
    with connect():
        (outcome,) = run_sweep(load_space(tmp_path / "space.py"), str(tmp_path / "out"), [killer])
    assert (outcome.status, outcome.error) == ("finished", None)
    assert killer.rounds == list(range(1, 13))
