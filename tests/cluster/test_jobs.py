"""A sweep by `ray job submit` on a head that asks for a token; without the token nothing runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.tracking.mlflow_runs import Tracker

pytest.importorskip("aiohttp_cors", reason="needs ray[default] (extra cluster)")
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
SPACE = """
from ray import tune

base = "tiny.yaml"
param_space = {"lora.rank": tune.grid_search([2, 4])}
objectives = {"server/accuracy": "max"}
"""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Head:
    """A head on loopback, and the environment of someone who has its token."""

    dashboard: str
    address: str
    trusted: dict[str, str]

    @property
    def stranger(self) -> dict[str, str]:
        """The environment of someone who has not."""
        home = Path(self.trusted["HOME"]) / "stranger"
        home.mkdir(exist_ok=True)
        return self.trusted | {"HOME": str(home)}

    def submit(self, environment: dict[str, str], *arguments: str, folder: Path) -> str:
        """Submit a job and wait for its end; returns all output."""
        options = ["--address", self.dashboard, "--working-dir", str(folder)]
        done = subprocess.run(
            [str(RAY), "job", "submit", *options, "--", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        return f"{done.stdout}{done.stderr}\nexit {done.returncode}"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home, folder = tmp_path_factory.mktemp("home"), tempfile.mkdtemp(prefix="ray-")
    environment = {name: value for name, value in os.environ.items() if "RAY" not in name}
    environment |= {"HOME": str(home), "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}  # a job's `python` is this one
    environment |= {"RAY_ADDRESS": "", "FEDLPP_RAY_CACHE": os.environ["FEDLPP_RAY_CACHE"]}
    subprocess.run(
        [str(RAY), "get-auth-token", "--generate"],
        env=environment,
        check=True,
        capture_output=True,
    )
    (home / ".ray" / "auth_token").chmod(0o600)
    del environment["RAY_ADDRESS"]
    port, dashboard, *others = free_ports(6)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    names += ("ray-client-server-port",)
    start = [str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    start += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    start += [f"--{name}={each}" for name, each in zip(names, others, strict=True)]
    start += ["--num-cpus=2", "--object-store-memory=200000000"]
    process = subprocess.Popen(start, env=environment, start_new_session=True)
    found = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    try:
        wait_for(found.dashboard, process)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            end_session(process.pid)
            shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the dashboard answers, if only that a token is missing."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, "the head ended"
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the dashboard does not answer")


def end_session(session: int) -> None:
    """End what is left of the processes that were started in a session of our own."""
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                process.kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


@pytest.fixture
def folder(tmp_path: Path, tiny_experiment: Experiment) -> Path:
    """A working directory as a job brings it: the code, an experiment and a search space."""
    shutil.copytree(ROOT / "fedlpp_ray", tmp_path / "job" / "fedlpp_ray")
    tiny = tiny_experiment.with_values({"federation.rounds": 1, "runtime.client_actors": 1})
    (tmp_path / "job" / "tiny.yaml").write_text(dump_experiment(tiny, "tiny", "x"))
    (tmp_path / "job" / "space.py").write_text(SPACE)
    return tmp_path / "job"


def test_a_submitted_sweep_runs_to_its_end(head: Head, folder: Path) -> None:
    results = folder.parent / "results"
    store = f"sqlite:///{folder.parent}/mlflow.db"
    command = ["python", "-m", "fedlpp_ray.tune", "space.py", "--storage", str(results)]
    said = head.submit(head.trusted, *command, "--tracking-uri", store, folder=folder)
    assert said.endswith("exit 0"), said
    (sweep,) = (path for path in results.iterdir() if (path / "sweep.csv").exists())
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 3
    assert len(list(sweep.glob("*/checkpoint_*/result.json"))) >= 2
    tracker = Tracker(store, sweep.name, folder.parent)
    runs = tracker.client.search_runs([tracker.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    token = (Path(head.trusted["HOME"]) / ".ray" / "auth_token").read_text().strip()
    assert token not in said
    assert all(token not in json.dumps(run.to_dictionary()) for run in runs)


def test_without_the_token_a_job_is_refused_and_does_not_run(head: Head, folder: Path) -> None:
    mark = folder.parent / "ran"
    said = head.submit(head.stranger, "touch", str(mark), folder=folder)
    assert not said.endswith("exit 0")
    assert "token" in said.lower()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=30)
    assert not mark.exists()
    assert head.submit(head.trusted, "touch", str(mark), folder=folder).endswith("exit 0")
    assert mark.exists()


def test_without_the_token_nobody_joins(head: Head) -> None:
    program = f"import ray; ray.init(address={head.address!r}); print(ray.nodes())"
    for environment, joins in ((head.stranger, False), (head.trusted, True)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert ("NodeID" in done.stdout) == joins, done.stderr
