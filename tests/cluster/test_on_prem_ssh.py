"""`cluster/on_prem.yaml` as its header says, on three machines of namespaces, over real sshd.

A laptop runs the commands; head and worker have what the header asks of every machine. Of the file
nothing is changed but its placeholders. Each machine's `~/venv` holds programs that stand in for
what this one lacks or must not run: pip and uv (no network: what they were asked is noted), systemd
(MLflow's server does run) and `ray stop`, which ends what `ray start` began on that machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machines
import pytest
from machines import HOME, USER, Machine
from test_jobs import ROOT, SPACE

from fedlpp_ray.config import Experiment, dump_experiment
from tests import tiny

LACKING = machines.missing() if sys.platform == "linux" else ["Linux"]
pytest.importorskip("aiohttp_cors", reason="needs ray[default] (extra cluster)")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(LACKING), reason=f"needs sshd and namespaces, lacks {LACKING}"),
]

ASK = """import sys, urllib.request as web
kind = {"Content-Type": "application/json"}
asked = web.Request(sys.argv[1], sys.argv[2].encode() or None, kind)
print(web.urlopen(asked, timeout=20).read().decode())
"""
BIN = Path(sys.executable).parent
NOTE = 'echo "$(basename "$0") $*" >> ~/calls\n'
PROGRAMS = {
    "python": f'exec {sys.executable} "$@"\n',
    "mlflow": f'exec {BIN}/mlflow "$@"\n',
    "pip": NOTE,
    "uv": NOTE,
    # A real `ray stop` ends every Ray that it sees.
    "ray": f"""{NOTE}
if [ "$1" != stop ]; then [ "$1" != start ] || export STARTED=1; exec {BIN}/ray "$@"; fi
for process in /proc/[0-9]*; do
    if grep -qzs ^STARTED= "$process/environ"; then kill -9 "${{process#/proc/}}"; fi
done
""",
    "systemd-run": f"""{NOTE}
while :; do case "$1" in
    --setenv=*) export "${{1#--setenv=}}" ;;
    --working-directory=*) cd "${{1#*=}}" ;;
    --*) ;;
    *) break ;;
esac; shift; done
setsid "$@" > ~/unit.log 2>&1 < /dev/null & echo $! > ~/unit
""",
    "systemctl": f"""{NOTE}
[ "$2" = stop ] && kill -- "-$(cat ~/unit)" || exit 0
while kill -0 -- "-$(cat ~/unit)" 2>/dev/null; do sleep 0.1; done
""",
}


@dataclass(frozen=True)
class Cluster:
    """The laptop, the machines that the file names, the file, and the folder that all share."""

    laptop: Machine
    head: Machine
    worker: Machine
    shared: Path
    file: str = str(HOME / "on_prem.yaml")

    def here(self, *words: str, where: Path = ROOT, **environment: str) -> str:
        """Run a command on the laptop; returns what it says."""
        line = self.laptop.command(*words, where=where, **environment)
        done = subprocess.run(line, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ray(self, command: str, *arguments: str) -> str:
        """A command of Ray on the file."""
        return self.here("ray", command, self.file, *arguments)

    def answer(self, url: str, body: str = "") -> str:
        """What the laptop gets from a URL, '' for no answer; a body is posted as JSON."""
        line = self.laptop.command("python", "-c", ASK, url, body, where=ROOT)
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def background(self, *words: str) -> subprocess.Popen[bytes]:
        """A command on the laptop that is left running."""
        return subprocess.Popen(self.laptop.command(*words, where=ROOT))

    def submit(self, folder: Path, *arguments: str) -> str:
        """Submit a sweep as documented and wait for its end; returns all output."""
        words = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "."]
        words += ["--", "python", "-m", "fedlpp_ray.tune", *arguments]
        line = self.laptop.command(*words, where=folder, RAY_AUTH_MODE="token")
        done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False)
        return f"{done.stdout}{done.stderr}\nexit {done.returncode}"


def calls(machine: Machine) -> str:
    """What the programs of its `~/venv` were asked."""
    return (machine.home / "calls").read_text()


def until(what: str, condition: Callable[[], Any], seconds: float = 240) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(1)


def prepare(machine: Machine, key: str) -> None:
    """What the header asks of every machine, and the programs that stand in."""
    (machine.home / ".ssh" / "authorized_keys").write_text(key)
    (machine.home / ".bashrc").write_text("export HF_HUB_OFFLINE=1\n")
    folder = machine.home / "venv" / "bin"
    folder.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("machines")
    (folder / "shared").mkdir()
    same = [ROOT, Path(sys.prefix), Path(sys.base_prefix), folder / "shared"]
    with machines.network(["laptop", "head", "worker"], folder, same) as found:
        cluster = Cluster(**found, shared=folder / "shared")
        key = str(HOME / ".ssh" / "fedlpp-ray")
        cluster.here("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        cluster.here("ray", "get-auth-token", "--generate")
        for machine in (cluster.head, cluster.worker):
            prepare(machine, (cluster.laptop.home / ".ssh" / "fedlpp-ray.pub").read_text())
        text = (ROOT / "cluster" / "on_prem.yaml").read_text()
        for name, value in {
            "REPLACE_HEAD": cluster.head.address,
            "REPLACE_WORKER": cluster.worker.address,
            "REPLACE_USER": USER,
            "REPLACE_SHARED": str(cluster.shared),
        }.items():
            text = text.replace(name, value)
        (cluster.laptop.home / "on_prem.yaml").write_text(text)
        yield cluster


def nodes(cluster: Cluster) -> dict[str, dict[str, float]]:
    """The resources of the nodes that live, by address, as the head tells them."""
    program = "import json, ray; ray.init(address='auto', log_to_driver=False, logging_level=50); "
    program += "print('NODES', json.dumps([n for n in ray.nodes() if n['Alive']]))"
    said = cluster.ray("exec", f'python -c "{program}"')
    line = next(line for line in said.splitlines() if line.startswith("NODES"))
    return {n["NodeManagerAddress"]: n["Resources"] for n in json.loads(line.removeprefix("NODES"))}


@pytest.fixture(scope="module")
def up(cluster: Cluster) -> Cluster:
    cluster.ray("up", "-y")
    until("the worker", lambda: len(nodes(cluster)) == 2)
    return cluster


def test_up_starts_the_head_and_the_head_its_worker(up: Cluster) -> None:
    found = nodes(up)
    assert found.keys() == {up.head.address, up.worker.address}
    assert "CPU" not in found[up.head.address]
    assert found[up.worker.address]["CPU"] >= 1
    assert up.head.address in up.ray("get-head-ip")


def test_a_sweep_is_told_of_no_machine_to_come(up: Cluster) -> None:
    """So one that is submitted before the workers are there is refused, and does not wait."""
    program = "import ray; from fedlpp_ray.runtime.growth import growth; "
    program += "ray.init(address='auto', log_to_driver=False); print('GROWTH', growth())"
    assert "GROWTH None" in up.ray("exec", f'python -c "{program}"')


def test_each_machine_was_set_up_as_written(up: Cluster) -> None:
    started = f"ray start --address={up.head.address}:6379 --object-manager-port=8076"
    assert started in calls(up.worker)
    assert "ray start --head --port=6379 --object-manager-port=8076" in calls(up.head)
    installed = [line for line in calls(up.head).splitlines() if line[:2] in ("pi", "uv")]
    assert len(installed) == 3
    for machine in (up.head, up.worker):
        assert [line for line in calls(machine).splitlines() if line in installed] == installed
        sent = machine.home / "fedlpp" / "constraints.txt"
        assert sent.read_text() == (ROOT / "constraints.txt").read_text()
        token = machine.home / ".ray" / "auth_token"
        assert token.read_text() == (up.laptop.home / ".ray" / "auth_token").read_text()
        assert token.stat().st_mode & 0o777 == 0o600


def test_exec_rsync_and_submit(up: Cluster) -> None:
    assert "head" in up.ray("exec", "hostname").split()
    assert "2 local.cluster.node" in up.ray("exec", "ray status")
    (up.laptop.home / "job.py").write_text("import sys; print('ran with', sys.argv[1:])")
    up.ray("rsync-up", str(HOME / "job.py"), str(HOME / "sent.py"))
    assert (up.head.home / "sent.py").read_text().startswith("import sys")
    assert "ran with ['--rounds=2']" in up.ray("submit", str(HOME / "job.py"), "--rounds=2")
    up.ray("rsync-down", str(HOME / "sent.py"), str(HOME / "back.py"))
    assert (up.laptop.home / "back.py").exists()


@pytest.fixture(scope="module")
def tunnels(up: Cluster) -> Cluster:
    up.background("ray", "dashboard", up.file)
    up.background("ray", "dashboard", up.file, "--port", "5000", "--remote-port", "5000")
    until("MLflow", lambda: up.answer("http://127.0.0.1:5000/health") == "OK")
    return up


@pytest.fixture(scope="module")
def job(cluster: Cluster, tiny_experiment: Experiment) -> Path:
    """A working directory as a job brings it, its model and text where every machine has them."""
    folder = cluster.shared / "job"
    shutil.copytree(ROOT / "fedlpp_ray", folder / "fedlpp_ray")
    model = tiny.make_model(cluster.shared / "model")
    data = tiny.write_csv(cluster.shared / "data.csv", tiny.make_rows(400))
    values = {"model.name": str(model), "task.data": str(data), "federation.rounds": 1}
    small = tiny_experiment.with_values(values | {"runtime.client_actors": 1})
    (folder / "tiny.yaml").write_text(dump_experiment(small, "tiny", "x"))
    (folder / "space.py").write_text(SPACE)
    return folder


def test_a_folder_that_the_worker_does_not_share_is_refused(tunnels: Cluster, job: Path) -> None:
    said = tunnels.submit(job, "space.py", "--storage", str(HOME / "results"))
    assert f"not the same folder on {tunnels.worker.address}" in said
    assert not said.endswith("exit 0")


def test_a_sweep_runs_on_the_worker_and_mlflow_has_it(tunnels: Cluster, job: Path) -> None:
    storage, store = tunnels.shared / "sweeps", "http://127.0.0.1:5000"
    options = ["--storage", str(storage), "--tracking-uri", store]
    said = tunnels.submit(job, "space.py", *options)
    assert said.endswith("exit 0"), said
    (sweep,) = (path for path in storage.iterdir() if (path / "sweep.csv").exists())
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 3
    assert len(list(sweep.glob("*/checkpoint_*/result.json"))) == 2
    api = f"{store}/api/2.0/mlflow"
    found = json.loads(
        tunnels.answer(f"{api}/experiments/get-by-name?experiment_name={sweep.name}")
    )
    asked = json.dumps({"experiment_ids": [found["experiment"]["experiment_id"]]})
    runs = json.loads(tunnels.answer(f"{api}/runs/search", asked))["runs"]
    assert [run["info"]["status"] for run in runs] == ["FINISHED"] * 2
    assert any((tunnels.shared / "mlflow").rglob("*"))


def running(machine: Machine, *names: str) -> list[str]:
    """Those of the programs that run there."""
    said = "\n".join(machine.processes())
    return [name for name in names if name in said]


def test_down_ends_ray_and_mlflow_on_both_machines(up: Cluster) -> None:
    assert running(up.worker, "raylet/raylet")
    assert running(up.head, "gcs_server", "mlflow server") == ["gcs_server", "mlflow server"]
    up.ray("exec", "systemctl --user stop fedlpp-mlflow")
    up.ray("down", "-y")
    assert running(up.head, "gcs_server", "raylet/raylet", "monitor.py", "mlflow server") == []
    until("the worker's end", lambda: not running(up.worker, "raylet/raylet"), 150)
    assert (up.head.home / "mlflow" / "mlflow.db").exists()
