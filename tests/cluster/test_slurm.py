"""`cluster/slurm.sh` with stand-ins for Slurm's commands, Ray, MLflow and the sweep, on PATH."""

import os
import re
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"
STANDS_FOR = {
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    # Of a step it runs the command, without the options of srun before it.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": 'echo "10.0.0.1 10.0.0.2"',
}
PROGRAMS = {
    "ray": '[ "$1" != start ] || exec sleep 300',
    # It writes to its database before it is ready; the question for its health waits for that.
    "mlflow": 'while [[ $1 != sqlite:* ]]; do shift; done; echo run >> "${1#sqlite:///}"\n'
    'echo "$$" >> "$LOG.pids"; touch "$LOG.ready"; exec sleep 300',
    "python": """case "$*" in
        *health*) until rm "$LOG.ready"; do sleep 0.05; done 2>/dev/null ;;
        -m*) echo "address $RAY_ADDRESS" >> "$LOG"; eval "${SWEEP:-true}" ;;
    esac""",
}


@dataclass(frozen=True)
class Stage:
    """A folder to submit from, and what the script finds there."""

    root: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", SCRIPT, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return (self.root / "log").read_text().splitlines()


def program(path: Path, body: str) -> None:
    """A command that writes down how it was called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >> "$LOG"\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    for name, body in STANDS_FOR.items():
        program(tmp_path / "bin" / name, body)
    for name, body in PROGRAMS.items():
        program(tmp_path / ".venv" / "bin" / name, body)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("not a secret")
    token.chmod(0o644)
    (tmp_path / "local").mkdir()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "local"),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "1",
    }
    return Stage(tmp_path, environment)


def mlflow_ended(stage: Stage) -> bool:
    """Whether every MLflow that was started is gone."""
    pids = (stage.root / "log.pids").read_text().split()
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ray_runs_on_every_node_and_the_sweep_on_the_first(stage: Stage) -> None:
    done = stage.run("space.py", "lora.rank=4")
    assert done.returncode == 0, done.stderr
    starts = [call for call in stage.calls if call.startswith("srun") and "ray start" in call]
    head, rest = sorted(starts, key=lambda call: "--head" not in call)  # they run at once
    assert "--nodelist=node1 " in head
    assert "--head --block --node-ip-address=10.0.0.1 --port=6379" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--nodelist=node2,node3 --nodes=2 " in rest
    assert "--block --address=10.0.0.1:6379 --num-cpus=8 --num-gpus=1" in rest
    root = stage.root
    assert (
        f"python -m fedlpp_ray.tune space.py lora.rank=4 --storage {root}/results/sweeps "
        "--tracking-uri http://127.0.0.1:5000"
    ) in stage.calls
    assert "address 10.0.0.1:6379" in stage.calls


def test_mlflow_is_on_loopback_and_its_database_survives_the_job(stage: Stage) -> None:
    for jobs in (1, 2):
        assert stage.run("space.py").returncode == 0
        database = stage.root / "results" / "mlflow" / "mlflow.db"
        assert database.read_text().split() == ["run"] * jobs
    server = next(call for call in stage.calls if call.startswith("mlflow server"))
    assert "--host 127.0.0.1 " in server
    assert f"sqlite:///{stage.root}/local/" in server
    assert list((stage.root / "local").iterdir()) == []
    assert mlflow_ended(stage)


def test_the_token_is_nobody_elses(stage: Stage) -> None:
    assert stage.run("space.py").returncode == 0
    token = stage.root / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.unlink()
    done = stage.run("space.py")
    assert done.returncode == 2
    assert "get-auth-token --generate" in done.stderr


def test_a_failed_sweep_fails_the_job(stage: Stage) -> None:
    assert stage.run("space.py", SWEEP="exit 3").returncode == 3
    assert mlflow_ended(stage)


def test_the_signal_before_the_end_stores_the_database(stage: Stage) -> None:
    environment = stage.environment | {"SWEEP": "exec sleep 300"}
    with subprocess.Popen(["bash", SCRIPT, "space.py"], env=environment) as job:
        until = time.monotonic() + 60
        while "address 10.0.0.1:6379" not in (stage.calls if (stage.root / "log").exists() else []):
            assert time.monotonic() < until
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 143
    assert (stage.root / "results" / "mlflow" / "mlflow.db").exists()
    assert mlflow_ended(stage)


def test_it_says_how_it_is_used(stage: Stage) -> None:
    assert stage.run().returncode == 2
    del stage.environment["SLURM_JOB_ID"]
    done = stage.run("space.py")
    assert done.returncode != 0
    assert "sbatch" in done.stderr


def problems(text: str) -> list[str]:
    """What the script must ask Slurm for, and must not do."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    wanted = {"exclusive", "requeue", "time", "nodes", "signal", "gpus-per-node"}
    found = [f"no --{name}" for name in sorted(wanted - options.keys())]
    if options.get("ntasks-per-node") != "1":
        found.append("several Rays on a node")
    if "0.0.0.0" in text or "set -euo pipefail" not in text:
        found.append("open to the network, or deaf to failures")
    done = subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True)
    return found + (["bash cannot parse it"] if done.returncode else [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("#SBATCH --exclusive\n", ""),
        ("#SBATCH --requeue\n", ""),
        ("--signal=B:TERM@120", ""),
        ("--ntasks-per-node=1\n", "--ntasks-per-node=4\n"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("set -euo pipefail", ""),
        ("\nfi\n", "\n"),
    ],
)
def test_the_shipped_script_is_whole_and_a_broken_copy_is_noticed(old: str, new: str) -> None:
    text = SCRIPT.read_text()
    assert problems(text) == []
    assert old in text
    assert problems(text.replace(old, new))
