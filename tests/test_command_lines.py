"""The commands as a user gives them, on a tiny model: what they print, write, log and refuse."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedlpp_ray import train
from fedlpp_ray.config import Experiment, dump_experiment, load_experiment
from tests import tiny

SPACE = """
from ray import tune

base = "tiny.yaml"
param_space = {"downlink.bits": tune.grid_search([2, 4]), "runtime.client_actors": 1}
objectives = {"server/accuracy": "max", "protection": "max", "bytes/total": "min"}
"""


@pytest.fixture
def project(tmp_path: Path, tiny_experiment: Experiment) -> Path:
    """A folder with a tiny experiment and a search space on it."""
    experiment = tiny_experiment.with_values({"federation.rounds": 2})
    (tmp_path / "tiny.yaml").write_text(dump_experiment(experiment, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    (tmp_path / "latin.yaml").write_bytes("# Größe\nseed: 0\n".encode("latin-1"))
    shutil.copytree(experiment.model.name, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    damaged = experiment.with_values({"model.name": "damaged"})
    (tmp_path / "damaged.yaml").write_text(dump_experiment(damaged, "damaged", "x"))
    return tmp_path


def command(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"fedlpp_ray.{module}", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_train_in_process_and_in_ray_write_the_same_result(
    project: Path, tiny_experiment: Experiment
) -> None:
    outcomes = []
    for name, flags in (("a", ["--in-process"]), ("b", ["--adapter", "adapter"])):
        output = ["--json", name, "--output", f"out-{name}"]
        done = command(project, "train", "tiny.yaml", "lora.rank=2", *output, *flags)
        assert done.returncode == 0, done.stderr
        assert "round 2/2" in done.stderr
        assert "protection" in done.stderr
        outcome = json.loads((project / name).read_text())
        keys = {"config", "history", "final", "floor", "protection", "threat", "ladder", "seconds"}
        assert set(outcome) == keys | {"versions", "seed"}
        assert set(outcome.pop("seconds")) == {"run", "leak", "leak_share", "ladder"}
        assert outcome["config"]["lora"]["rank"] == 2
        assert [record["round"] for record in outcome["history"]] == [1, 2]
        for record in outcome["history"]:
            assert set(record.pop("seconds")) >= {"broadcast", "train", "aggregate", "evaluate"}
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_experiment.model.name, num_labels=3
    )
    adapted = PeftModel.from_pretrained(base, project / "adapter")
    assert adapted.peft_config["default"].r == 2


@pytest.mark.slow
def test_a_centralised_run_says_what_any_run_says(project: Path) -> None:
    """And nothing of Ray Train's; it goes on from a checkpoint of its own."""
    arguments = ["train", "tiny.yaml", "method=centralised", "--output", "run"]
    done = command(project, *arguments)
    assert (done.returncode, done.stdout) == (0, "")
    ours = (
        "tiny.yaml",
        "placement",
        "  ",
        "round",
        "floor",
        "server",
        "protection",
        "threat",
        "result",
    )
    lines = [x for x in done.stderr.splitlines() if x and "Generating train split" not in x]
    assert [line for line in lines if not line.startswith(ours)] == []
    (project / "run" / "result.json").rename(project / "first.json")
    shutil.rmtree(project / "run" / "checkpoints" / "round-000002")
    again = command(project, *arguments, "--resume")
    assert "going on after round-000001" in again.stderr
    results = [
        json.loads((project / name).read_text()) for name in ("first.json", "run/result.json")
    ]
    for outcome in results:
        for timed in (outcome, *outcome["history"]):
            del timed["seconds"]
    assert results[0] == results[1]


METHODS = sorted((Path(__file__).parents[1] / "configs" / "methods").glob("*.yaml"))
SMALL = ("model", "task", "federation")
"""Sections that make an experiment tiny and leave its method as it is."""


@pytest.mark.slow
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_shipped_method_runs_from_the_command_line(
    path: Path,
    tiny_values: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = {k: v for k, v in tiny_values.items() if k.partition(".")[0] in SMALL}
    small |= {"model.sha256": "null", "federation.rounds": 2}
    if load_experiment(path).emulator.kind != "none":  # a prompt of 20, layers to drop, few texts
        small["model.name"] = tiny.make_model(tmp_path / "deep", layers=4)
        small |= {"task.max_length": 12, "server.examples": 40, "emulator.steps": 2}
    overrides = [f"{key}={value}" for key, value in small.items()]
    output = tmp_path / "out"
    assert train.main([str(path), *overrides, "--in-process", "--output", str(output)]) == 0
    shown = capsys.readouterr().err
    assert "round 2/2" in shown
    assert "protection" in shown
    outcome = json.loads((output / "result.json").read_text())
    without = [record["server"] is None for record in outcome["history"]]
    assert without == [path.stem in ("fedsa_lora", "local_only")] * 2


def slow(*values: object) -> Any:
    """Starts Ray."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "gone.yaml"], "gone.yaml: no such file"),
        (["train", "tiny.yaml", "lora.rnk=2"], "did you mean 'rank'"),
        (["train", "tiny.yaml", "lora.rank"], "not of the form key=value"),
        (["train", "tiny.yaml", "--json", "no/where.json"], "--json no/where.json: cannot be"),
        (["train", "tiny.yaml", "--json", "."], "--json .: cannot be written: Is a directory"),
        (["train", "tiny.yaml", "--adapter", "tiny.yaml"], "--adapter tiny.yaml: cannot be made"),
        (["train", "tiny.yaml", "--output", "s3://b/x"], "--output s3://b/x: a path is needed"),
        (["train", "tiny.yaml", "--json", "gs://b/x"], "--json gs://b/x: a path is needed"),
        (["train", "latin.yaml"], "latin.yaml: not UTF-8"),
        (["train", "tiny.yaml", "task.max_length=33"], "has 32 positions"),
        (["train", "tiny.yaml", "lora.rank=10000000"], "allows at most 64"),
        (["train", "tiny.yaml", "runtime.client_gpus=1.0", "--in-process"], "CUDA is not"),
        slow(["train", "tiny.yaml", "client.lr=1e30"], "diverged (client.lr = 1e+30)"),
        (
            ["train", "tiny.yaml", "--in-process", "server.max_update_norm=1e-9"],
            "round 1, update of client 3 refused: its norm",
        ),
        (
            ["train", "tiny.yaml", "--in-process", "client.max_broadcast_norm=1e-9"],
            "client.max_broadcast_norm",
        ),
        (["train", "damaged.yaml", "--in-process"], "model.name = 'damaged'"),
        (["train", "tiny.yaml", "lora.targets=[nope]"], "linear layers: query, key"),
        (["train", "tiny.yaml", "federation.clients=999"], "federation.clients = 999"),
        (["train", "tiny.yaml", "task.text_column=x"], "its columns: text, label"),
        slow(["train", "tiny.yaml", "runtime.client_gpus=1.0"], "0.5 CPU and 1 GPU"),
        (["tune", "gone.py"], "gone.py: no such file"),
        (["tune", "space.py", "downlink.kind=x"], "downlink.kind: allowed"),
        (["tune", "space.py", "model.name=./gone"], "no such file or folder"),
        slow(["tune", "space.py", "runtime.client_cpus=512.0"], "one actor requires 512 CPU"),
        (["tune", "space.py", "--tracking-uri", "nonsense://x"], "nonsense"),
        (["tune", "space.py", "--storage", "tiny.yaml"], "--storage"),
        (["tune", "space.py", "--storage", "foo://bar/x"], "--storage foo://bar/x"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    project: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    module, *rest = arguments
    main = importlib.import_module(f"fedlpp_ray.{module}").main
    assert main(rest) == 2  # an error that is not the user's would be raised
    assert "error: " in (shown := capsys.readouterr().err)
    assert words in shown


@pytest.mark.slow
def test_a_two_trial_sweep_is_tracked_shown_and_not_run_again(project: Path) -> None:
    done = command(project, "tune", "space.py", "--storage", "out")
    assert done.returncode == 0, done.stderr + done.stdout
    (folder,) = (project / "out").glob("space-*")
    check_mlflow(project / "out", folder.name)
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["downlink.bits"] for row in rows] == ["2", "4"]
    assert all(row["server/accuracy"] for row in rows)
    assert float(rows[0]["bytes/down"]) < float(rows[1]["bytes/down"])
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stderr
    assert "/#/compare-runs?runs=" in done.stderr
    # The same command again shows the finished sweep without running it.
    before = {p: p.stat().st_mtime for p in folder.rglob("checkpoint_*/history.json")}
    again = command(project, "tune", "space.py", "--storage", "out")
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime for p in folder.rglob("checkpoint_*/history.json")} == before
    assert again.stdout == done.stdout
    check_mlflow(project / "out", folder.name)


def check_mlflow(storage: Path, sweep: str) -> None:
    """Two flat runs, each round logged once, with the artifacts to use and repeat the run."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name(sweep)
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    assert {run.data.params["downlink.bits"] for run in runs} == {"2", "4"}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["fedlpp.sweep"] == sweep
        assert "mlflow.parentRunId" not in run.data.tags
        assert run.data.params["lora.rank"] == "4"
        rounds = client.get_metric_history(run.info.run_id, "bytes/total")
        assert [point.step for point in rounds] == [1, 2]
        names = set(run.data.metrics)
        assert names >= {"server/accuracy", "client_before/loss", "floor", "seconds/train"}
        files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert files >= {"adapter", "experiment.yaml", "history.json", "labels.png", "result.json"}
        downloaded = Path(client.download_artifacts(run.info.run_id, "."))
        outcome = json.loads((downloaded / "result.json").read_text())
        logged = run.data.metrics["server/accuracy"]
        assert outcome["history"][-1]["server"]["accuracy"] == logged
        value = outcome["protection"]["value"]
        assert run.data.metrics.get("protection") == value  # None where it is undefined
        experiment_again = load_experiment(downloaded / "experiment.yaml")
        assert experiment_again.model_dump(mode="json") == outcome["config"]


def test_the_compare_link_names_the_runs(project: Path, tmp_path: Path) -> None:
    from fedlpp_ray.tracking.mlflow_runs import Tracker, default_uri

    tracker = Tracker(default_uri(tmp_path / "s"), "x", tmp_path / "a")
    link = unquote(tracker.compare_link(["r1", "r2"]))
    assert link == (
        'http://127.0.0.1:5000/#/compare-runs?runs=["r1","r2"]'
        f'&experiments=["{tracker.experiment_id}"]'
    )


def test_a_ray_address_where_nothing_listens_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert train.main(["tiny.yaml"]) == 2
    assert "RAY_ADDRESS = '127.0.0.1:1': nothing answers there" in capsys.readouterr().err
