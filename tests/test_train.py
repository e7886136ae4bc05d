"""A run of the command line that is stopped: what it leaves, and how the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from fedlpp_ray import train
from fedlpp_ray.command_line import StopSignal
from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.federation.in_process import InProcess

ROUNDS = 16


def write(folder: Path, experiment: Experiment) -> None:
    (folder / "tiny.yaml").write_text(dump_experiment(experiment, "tiny", "x"))


@pytest.fixture
def project(tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny experiment of two rounds, which is the working directory."""
    write(tmp_path, tiny_experiment.with_values({"federation.rounds": 2}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedlpp_ray.train", "tiny.yaml", "--in-process", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_round(process: subprocess.Popen[str], folder: Path, wanted: int) -> None:
    for _ in range(6000):
        if (folder / "checkpoints" / f"round-{wanted:06d}").exists():
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"round {wanted} was never finished")


def result(folder: Path) -> dict[str, Any]:
    """All but the times."""
    outcome = json.loads((folder / "result.json").read_text())
    for timed in (outcome, *outcome["history"]):
        del timed["seconds"]
    return outcome


def the_mlflow_run(uri: str) -> tuple[str, list[int], list[int]]:
    """Its status, and the rounds at which a metric of rounds and one of the end were logged."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("train")
    (run,) = client.search_runs([experiment.experiment_id])
    steps = [
        [point.step for point in client.get_metric_history(run.info.run_id, name)]
        for name in ("bytes/total", "seconds/run")
    ]
    return run.info.status, steps[0], steps[1]


@pytest.mark.slow
def test_a_run_stopped_and_killed_goes_on_to_the_same_numbers(
    project: Path, tiny_experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, then SIGKILL, then the end; MLflow has one run with each round once."""
    write(project, tiny_experiment.with_values({"federation.rounds": ROUNDS}))
    uri = f"sqlite:///{project / 'mlflow.db'}"
    options = ["--output", "run", "--tracking-uri", uri]
    first = start(*options)
    wait_for_round(first, project / "run", 2)
    first.terminate()
    _, shown = first.communicate(timeout=120)
    assert first.returncode == 143, shown
    line = shown.strip().splitlines()[-1]
    assert line.startswith("stopped; run holds")
    assert line.endswith(f"of {ROUNDS} rounds: the same command with --resume goes on")
    status, logged, _ = the_mlflow_run(uri)
    assert status == "KILLED"
    assert 0 < len(logged) < ROUNDS

    second = start(*options, "--resume")
    wait_for_round(second, project / "run", max(logged) + 3)
    second.kill()
    second.communicate(timeout=120)
    assert not (project / "run" / "result.json").exists()

    command = ["tiny.yaml", "--in-process"]
    assert train.main([*command, *options, "--resume", "--json", "out.json"]) == 0
    assert "run: going on after round-0000" in capsys.readouterr().err
    assert the_mlflow_run(uri) == ("FINISHED", list(range(1, ROUNDS + 1)), [ROUNDS])
    assert train.main([*command, "--output", "whole"]) == 0
    assert result(project / "run") == result(project / "whole")
    assert (project / "out.json").read_text() == (project / "run" / "result.json").read_text()
    check_artifacts(uri)

    assert train.main([*command, *options, "--resume"]) == 0
    assert the_mlflow_run(uri) == ("FINISHED", list(range(1, ROUNDS + 1)), [ROUNDS])


def check_artifacts(uri: str) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("train")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["federation.rounds"] == str(ROUNDS)
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    records = {"experiment.yaml", "history.json", "result.json"}
    assert files == {"adapter", "leak_curve.png"} | records


def test_a_folder_that_holds_rounds_is_refused_and_a_finished_run_shown_again(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["tiny.yaml", "--in-process"]
    assert train.main([*command, "--resume", "--adapter", "a"]) == 0
    assert "nothing to go on with: starting" in (shown := capsys.readouterr().err)
    (folder,) = (project / "results").iterdir()
    assert folder.name.startswith("tiny-")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}

    def never(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(InProcess, "__init__", never)
    assert train.main(command) == 2
    refusal = capsys.readouterr().err
    assert f"{folder.relative_to(project)} holds 2 finished rounds of a run already" in refusal
    assert "--resume goes on with it, --output DIR starts anew" in refusal
    moved = ["runtime.client_actors=5", "--json", "again.json", "--adapter", "b"]
    assert train.main([*command, *moved, "--resume"]) == 0
    again = capsys.readouterr().err
    assert again.splitlines()[0].endswith(": finished")
    assert again.splitlines()[1:] == shown.splitlines()[-6:]
    assert (project / "again.json").read_text() == (folder / "result.json").read_text()
    for path in (project / "a").iterdir():
        assert (project / "b" / path.name).read_bytes() == path.read_bytes()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before


def test_a_run_of_another_configuration_is_not_gone_on_with(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tiny.yaml", "--in-process", "--output", "run"]
    assert train.main(command) == 0
    words = "downlink.bits is 4 in the checkpoint, 2 here"
    assert train.main([*command, "--resume", "downlink.bits=2"]) == 2
    assert f"run/result.json is of another experiment: {words}" in capsys.readouterr().err
    (project / "run" / "result.json").unlink()
    assert train.main([*command, "--resume", "downlink.bits=2"]) == 2
    assert f"round-000002 is of another experiment: {words}" in capsys.readouterr().err
    # Killed before its floor was measured; and it need not have known that it is attacked.
    assert train.main([*command, "--resume", "adversary.at_end=[last-broadcast]"]) == 0
    (attacked,) = result(project / "run")["ladder"]["attacks"]
    assert attacked["metrics"] == result(project / "run")["history"][-1]["client_before"]


def test_ctrl_c_leaves_a_folder_to_go_on_with(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, evaluated = InProcess.evaluate, []

    def interrupted(backend: InProcess, round: int, *rest: Any) -> Any:
        evaluated.append(round)
        if evaluated == [2, 3]:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(backend, round, *rest)

    monkeypatch.setattr(InProcess, "evaluate", interrupted)
    command = ["tiny.yaml", "--in-process", "--output", "run"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        assert train.main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped; run holds 1 of 2 rounds" in capsys.readouterr().err
    assert train.main([*command, "--resume"]) == 0
    assert evaluated == [2, 3, 3]  # the first round is not run again


def test_a_stop_waits_for_what_must_not_be_cut_in_two() -> None:
    done = []

    def work(stop: StopSignal) -> None:
        with stop.held():
            signal.raise_signal(signal.SIGTERM)
            done.append("the whole block")
        done.append("nothing after it")

    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        work(stop)
    assert done == ["the whole block"]
    assert stop.status == 143


def test_a_signal_is_taken_only_in_the_block_and_may_be_taken_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.listen()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert stop.status == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_runs_in_a_thread_too() -> None:
    found: list[int] = []

    def block() -> None:
        with StopSignal() as stop:
            found.append(stop.status)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [130]


def test_a_tracking_store_that_cannot_be_used_is_refused_at_once(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["tiny.yaml", "--in-process", "--tracking-uri", "nonsense://x"]) == 2
    assert "MLflow at 'nonsense://x'" in (shown := capsys.readouterr().err)
    assert "preparing" not in shown


def test_a_result_with_numbers_that_are_none_is_shown() -> None:
    from fedlpp_ray.tracking.progress import protection_lines

    outcome = {
        "floor": {"base": {"utility": None}, "local_only": {"utility": 0.5}, "client": 1,
                  "examples": 2},
        "protection": {"strongest": ["x", None], "value": None, "server": None, "reason": "y"},
    }  # fmt: skip
    console = Console()
    with console.capture() as shown:
        for line in protection_lines(outcome):
            console.print(line)
    assert "base nan  local-only 0.500" in shown.get()


@pytest.mark.parametrize("party", ["server", "client"])
@pytest.mark.parametrize(("key", "value"), [("num_workers", 2), ("zero.stage", 3)])
@pytest.mark.usefixtures("project")
def test_one_process_has_no_ranks(
    party: str, key: str, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["tiny.yaml", "--in-process", f"{party}.{key}={value}"]) == 2
    shown = capsys.readouterr().err
    assert f"error: {party}.{key} = {value} needs a group of processes" in shown
    assert "preparing" not in shown
    assert not Path("results").exists()
