"""From a head alone to a finished sweep on spot nodes, one of them preempted, and down to nothing.

moto answers for AWS. The `ssh` and `rsync` that come first on PATH act on this machine, in a home
of its own for each address: so Ray's own autoscaler, started by `ray up`, launches instances in
moto and real raylets here. Results are in moto's S3. Nothing beyond this machine is ever dialled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from aws_stand_in import aws, fill_in, tags_of
from cluster_file import Config, load
from test_jobs import RAY, ROOT, SPACE, free_ports

from fedlpp_ray.config import Experiment, dump_experiment

boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto.server", reason="needs moto[server] (extra cluster-tests)")
pytest.importorskip("aiohttp_cors", reason="needs ray[default] (extra cluster)")
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MARK = "FEDLPP_TEST_CLOUD"
"""An environment variable of every process that this test starts, by which they are ended."""
STAND_IN = """#!{python}
import os, re, shutil, subprocess, sys

def home(target):
    folder = os.path.join(os.environ["{mark}"], "nodes", target.partition("@")[2].partition(":")[0])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".bashrc"), "w") as file:  # a login shell sets its own PATH
        file.write("export PATH=" + os.environ["PATH"] + chr(10))
    return folder

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "rsync":
    source, target = arguments[-2:]
    folder, path = home(target), target.partition(":")[2]
    path = os.path.join(folder, path.removeprefix("~/"))
    assert path.startswith(folder), path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copy(os.path.expanduser(source), path)
    sys.exit()
at = next(i for i, word in enumerate(arguments) if re.match("ubuntu@", word))
folder, command = home(arguments[at]), " ".join(arguments[at + 1 :])
if "ray stop" in command:  # it would end every Ray of this machine
    sys.exit()
environment = os.environ | dict(HOME=folder)
sys.exit(subprocess.run(["bash", "-c", command], env=environment, cwd=folder).returncode)
"""


@dataclass(frozen=True)
class Cloud:
    """A cluster file whose nodes are on this machine."""

    file: Path
    region: str
    address: str
    s3: str
    """What a URI of S3 ends with here."""

    def ray(self, command: str, *arguments: str) -> None:
        """Run a command of Ray on the cluster file."""
        line = [str(RAY), command, str(self.file), *arguments]
        subprocess.run(line, cwd=ROOT, check=True, timeout=300)

    def workers(self) -> list[dict[str, Any]]:
        """The workers that run."""
        ec2 = boto3.client("ec2", region_name=self.region)
        running = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        found = ec2.describe_instances(Filters=running)["Reservations"]
        instances = [instance for reservation in found for instance in reservation["Instances"]]
        return [i for i in instances if tags_of(i)["ray-node-type"] == "worker"]

    def preempt(self, instance: str) -> None:
        """End a node without notice."""
        ec2 = boto3.client("ec2", region_name=self.region)
        ec2.terminate_instances(InstanceIds=[instance])
        for process in ours():
            if process.environ().get("RAY_CLOUD_INSTANCE_ID") == instance:
                process.kill()

    def objects(self) -> list[str]:
        """Names in the bucket."""
        found = boto3.client("s3", region_name=self.region).list_objects_v2(Bucket="bucket")
        return [each["Key"] for each in found.get("Contents", [])]


def ours() -> Iterator[psutil.Process]:
    """Every process that this test has started, this one excepted."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK] and process.pid != os.getpid():
                yield process
        except (psutil.Error, OSError):
            continue


def on_this_machine(config: Config, port: int, dashboard: int, address: str) -> Config:
    """The file without what belongs to Ubuntu, and with ports that nobody has here."""
    for name in ("initialization_commands", "setup_commands", "worker_setup_commands"):
        config[name] = []
    config["setup_commands"] = ["chmod 600 ~/.ray/auth_token"]
    config["file_mounts"] = {"~/.ray/auth_token": "~/.ray/auth_token"}
    config["idle_timeout_minutes"] = 0.3
    for role in ("head", "worker"):
        commands = config[f"{role}_start_ray_commands"]
        start = next(command for command in commands if "ray start" in command)
        start = start.replace(" --object-manager-port=8076", "")
        start = start.replace("--port=6379", f"--port={port} --dashboard-port={dashboard}")
        start = start.replace("$RAY_HEAD_IP:6379", address)
        config[f"{role}_start_ray_commands"] = [f"{start} --object-store-memory=100000000"]
    return config


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    root = Path(tempfile.mkdtemp(prefix="fedlpp-"))
    for name in ("ssh", "rsync"):
        (root / name).write_text(STAND_IN.format(python=sys.executable, mark=MARK))
        (root / name).chmod(0o755)
    (root / ".ssh").mkdir()
    (root / ".ssh" / "fedlpp-ray.pem").write_text("nothing")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port, dashboard = free_ports(2)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    settings = {
        MARK: str(root),
        "HOME": str(root),
        "PATH": f"{root}:{RAY.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(root),
        "TMPDIR": str(root),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    subprocess.run([str(RAY), "get-auth-token", "--generate"], check=True, capture_output=True)
    location = {"LocationConstraint": "us-west-2"}
    with aws(monkeypatch) as endpoint:
        config = fill_in(load(ROOT / "cluster" / "aws.yaml"))
        config = on_this_machine(config, port, dashboard, address)
        (root / "aws.yaml").write_text(yaml.safe_dump(config))
        boto3.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration=location)
        query = f"?scheme=http&endpoint_override={endpoint}"
        try:
            yield Cloud(root / "aws.yaml", config["provider"]["region"], address, query)
        finally:
            for process in list(ours()):
                process.kill()
            shutil.rmtree(root, ignore_errors=True)


def until(what: str, condition: Callable[[], Any], seconds: float = 240) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(1)


def autoscaler_is_there(address: str) -> bool:
    """Whether it says so; some seconds after `ray up` it does."""
    program = f"import ray; ray.init(address={address!r}, log_to_driver=False); "
    program += "from fedlpp_ray.runtime.growth import growth; raise SystemExit(growth() is None)"
    return subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def space(tmp_path: Path, tiny_experiment: Experiment) -> Path:
    """Two trials, each of which fills a worker."""
    values = {"federation.rounds": 8, "runtime.client_actors": 1, "runtime.start_timeout": 300.0}
    values |= {"runtime.client_cpus": 3.0, "runtime.server_cpus": 3.0}
    tiny = tiny_experiment.with_values(values)
    (tmp_path / "tiny.yaml").write_text(dump_experiment(tiny, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    return tmp_path / "space.py"


def test_from_no_worker_over_a_preemption_to_no_worker(cloud: Cloud, space: Path) -> None:
    cloud.ray("up", "-y", "--no-config-cache")
    until("autoscaler", lambda: autoscaler_is_there(cloud.address))
    assert cloud.workers() == []
    command = [sys.executable, "-m", "fedlpp_ray.tune", str(space), "--storage"]
    (home,) = (cloud.file.parent / "nodes").iterdir()  # the head's, where a job's driver runs
    environment = os.environ | {"RAY_ADDRESS": cloud.address, "HOME": str(home)}

    local = subprocess.run(
        [*command, str(space.parent / "results")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert local.returncode == 2, local.stderr
    assert "on a disk of this node alone" in local.stderr
    assert cloud.workers() == []

    with (space.parent / "said").open("w") as said:
        sweep = subprocess.Popen(
            [*command, f"s3://bucket/sweeps{cloud.s3}"],
            cwd=space.parent,
            env=environment,
            stdout=said,
            stderr=said,
        )
        until("two workers", lambda: len(cloud.workers()) == 2)
        assert {tags_of(i)["ray-user-node-type"] for i in cloud.workers()} == {"gpu_spot"}
        assert {i["InstanceLifecycle"] for i in cloud.workers()} == {"spot"}
        until("a round", lambda: any("checkpoint_" in name for name in cloud.objects()))
        lost = cloud.workers()[0]["InstanceId"]
        cloud.preempt(lost)
        text = (space.parent / "said").read_text
        assert sweep.wait(500) == 0, text()
    results = [n for n in cloud.objects() if n.endswith("checkpoint_000007/result.json")]
    assert len(results) == 2, text()
    until("no worker", lambda: cloud.workers() == [])
    cloud.ray("down", "-y")
    ec2 = boto3.client("ec2", region_name=cloud.region)
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert {instance["State"]["Name"] for instance in found} == {"terminated"}
    assert lost in {instance["InstanceId"] for instance in found}
