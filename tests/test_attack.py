"""The command that attacks a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fedlpp_ray import attack, train
from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.storage import DamagedError, RunFolder


@pytest.fixture(scope="module")
def run(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    experiment = tiny_experiment.with_values({"downlink.bits": 2})
    (folder / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    output = ["--output", str(folder / "run"), "--in-process"]
    assert train.main([str(folder / "x.yaml"), *output]) == 0
    return folder / "run"


def test_a_finished_run_is_attacked_and_protection_is_against_the_strongest(run: Path) -> None:
    assert attack.main([str(run), "adversary.max_looks=1", "adversary.colluders=2"]) == 0
    report = json.loads((run / "attacks.json").read_text())
    utilities = {each["name"]: each["metrics"]["utility"] for each in report["attacks"]}
    assert report["adversary"]["colluders"] == 2
    total = report["protection"]
    assert total["strongest"][1] == max(utilities.values())
    server = json.loads((run / "result.json").read_text())["history"][-1]["server"]["utility"]
    assert total["server"] == server
    if total["value"] is not None:
        floor = total["floor"][1]
        expected = (server - max(utilities.values())) / (server - floor)
        assert total["value"] == pytest.approx(expected)
    assert set(report["levels"]) == {"broadcast", "trained"}


def test_the_leak_curve_is_the_strongest_attack_after_each_broadcast(
    run: Path, tmp_path: Path
) -> None:
    out, store = tmp_path / "out.json", f"sqlite:///{tmp_path / 'mlflow.db'}"
    options = ["--attacks", "last-broadcast,mean-factors,tuned", "--curve", "1"]
    assert attack.main([str(run), *options, "--json", str(out), "--tracking-uri", store]) == 0
    report = json.loads(out.read_text())
    curve = report["leak_curve"]
    assert [each["round"] for each in curve] == [0, 1, 2, 3]
    history = json.loads((run / "result.json").read_text())["history"]
    for point, record in zip(curve[1:], history, strict=True):
        assert point["utility"] >= record["client_before"]["utility"]
        if point["name"] == "last-broadcast":
            assert point["utility"] == record["client_before"]["utility"]
    assert (tmp_path / "leak_curve.png").read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(store)
    (logged,) = client.search_runs([client.get_experiment_by_name("train").experiment_id])
    points = client.get_metric_history(logged.info.run_id, "attacks/leak_curve")
    assert [(p.step, p.value) for p in points] == [(c["round"], c["utility"]) for c in curve]
    assert logged.data.metrics["attacks/strongest"] == report["protection"]["strongest"][1]
    assert logged.info.status == "FINISHED"


def test_only_what_was_asked_for_is_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert attack.main([str(run), "--attacks", "trend,interval", "--json", str(out)]) == 0
    assert [each["name"] for each in json.loads(out.read_text())["attacks"]] == [
        "trend",
        "interval",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["downlink.bits=4"], "downlink.bits: the run is over; only keys of adversary"),
        (["adversary.colluders=0"], "adversary.colluders"),
        (["adversary.colluders=99"], "adversary.colluders = 99 is more than"),
        (["--curve", "1", "--attacks", "tuned"], "none of these attacks only reads broadcasts"),
        (["--curve", "0"], "allowed: 1 and more"),
        (["--attacks", "nonsense"], "attack 'nonsense' is not one of"),
    ],
)
def test_wrong_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert attack.main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_servers_utility_protection_is_undefined_for_that_reason(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    outcome = json.loads(path.read_text())
    outcome["history"][-1]["server"] = None
    path.write_text(json.dumps(outcome))
    assert attack.main([str(path.parent), "--attacks", "last-broadcast", "--curve", "2"]) == 0
    report = json.loads((path.parent / "attacks.json").read_text())
    assert report["protection"]["reason"] == "the server has no model"


def test_a_folder_without_a_finished_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack.main([str(tmp_path)]) == 2
    assert "has no result.json" in capsys.readouterr().err


def test_broadcasts_are_kept_whole_and_replaced_where_a_round_came_to_another(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    folder = RunFolder(tmp_path, tiny_experiment)
    assert folder.kept() == {}
    (tmp_path / "broadcasts" / "round-000002.part").mkdir(parents=True)  # a crash left it
    folder.keep(2, {8: b"second"})
    folder.keep(1, {4: b"first", 8: b"one"})
    folder.keep(1, {4: b"first", 8: b"one"})
    folder.keep(3, {8: b""})
    assert folder.kept() == {1: {4: b"first", 8: b"one"}, 2: {8: b"second"}}
    folder.keep(1, {8: b"of the round that went on"})
    assert folder.kept()[1] == {8: b"of the round that went on"}
    (tmp_path / "broadcasts" / "round-000002" / "8.safetensors").write_bytes(b"secund")
    with pytest.raises(DamagedError, match=r"8\.safetensors"):
        folder.kept()
