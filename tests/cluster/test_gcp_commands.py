"""`ray up`, `get-head-ip`, `exec`, `submit`, `down` of `cluster/gcp.yaml` against a stand-in.

What Ray's provider asks of Compute Engine, IAM and the Resource Manager goes to a server of this
test on loopback (`gcp_stand_in`); `ssh` and `rsync` only note how they were called. Needs the
extras `cluster` and `gcp`; no network, no credentials.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml
from cluster_file import load
from gcp_checks import unlike
from gcp_stand_in import Google, google
from ray_commands import ROOT, Commands, prepare

pytest.importorskip("googleapiclient", reason="needs google-api-python-client (extra gcp)")
pytest.importorskip("aiohttp_cors", reason="needs ray[default] (extra cluster)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(which("openssl") is None, reason="needs openssl, for a certificate"),
]

PATH = ROOT / "cluster" / "gcp.yaml"
PROJECT, KEY = "some-project", "ssh-ed25519 AAAA ubuntu"
ACCOUNT = f"ray-autoscaler-sa-v1@{PROJECT}.iam.gserviceaccount.com"
WORKERS = f"workers@{PROJECT}.iam.gserviceaccount.com"
SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
LAUNCH = """
import sys, yaml
from ray.autoscaler._private import commands, providers
config = yaml.safe_load(open(sys.argv[1]))
config = commands._bootstrap_config(commands.prepare_config(config), no_config_cache=True)
provider = providers._get_node_provider(config["provider"], config["cluster_name"])
for kind in ("gpu_on_demand", "gpu_spot"):
    node = config["available_node_types"][kind]["node_config"]
    tags = {"ray-node-name": "ray-fedlpp-ray-worker", "ray-node-type": "worker"}
    provider.create_node(node, tags | {"ray-user-node-type": kind}, 1)
"""


@dataclass(frozen=True)
class Cloud(Commands):
    """And the stand-in."""

    google: Google

    @property
    def refused(self) -> str:
        """Hosts outside of this machine that were to be reached."""
        file = self.home / "refused"
        return file.read_text() if file.exists() else ""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    home = tmp_path_factory.mktemp("home")
    text = json.dumps(load(PATH).config).replace("REPLACE_PROJECT", PROJECT)
    text = text.replace("REPLACE_WORKER_ACCOUNT", WORKERS).replace("REPLACE_PUBLIC_KEY", KEY)
    text = text.replace("REPLACE_SUBNET", "subnet").replace("REPLACE_BUCKET", "bucket")
    (home / "gcp.yaml").write_text(yaml.safe_dump(json.loads(text)))
    with pytest.MonkeyPatch.context() as patch, google(PROJECT, home) as (found, environment):
        prepare(home, "fedlpp-ray", patch)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield Cloud(home, home / "gcp.yaml", found)


@pytest.fixture(scope="module")
def up(cloud: Cloud) -> Cloud:
    cloud.ray("up", "-y")
    return cloud


def metadata(body: dict[str, Any]) -> dict[str, str]:
    """An instance's metadata by key."""
    return {item["key"]: item["value"] for item in body["metadata"]["items"]}


def common(body: dict[str, Any]) -> None:
    """What every node has."""
    assert unlike(body) == []
    assert (
        body["labels"].items()
        >= {"ray-cluster-name": "fedlpp-ray", "project": "fedlpp-ray"}.items()
    )
    assert body["tags"] == {"items": ["fedlpp-ray"]}
    assert metadata(body) == {
        "enable-oslogin": "FALSE",
        "block-project-ssh-keys": "TRUE",
        "ssh-keys": f"ubuntu:{KEY}",
    }
    (disk,) = body["disks"]
    assert disk["boot"]
    assert disk["autoDelete"]
    (interface,) = body["networkInterfaces"]
    assert interface["subnetwork"] == f"projects/{PROJECT}/regions/us-west1/subnetworks/subnet"
    assert interface["accessConfigs"] == [{"name": "External NAT", "type": "ONE_TO_ONE_NAT"}]


def test_up_asks_for_the_head_as_written_and_for_no_worker(up: Cloud) -> None:
    (head,) = up.google.inserted()
    common(head)
    assert head["machineType"] == "zones/us-west1-a/machineTypes/e2-standard-4"
    assert head["labels"]["ray-node-type"] == "head"
    assert head["labels"]["ray-user-node-type"] == "head_cpu"
    assert head["scheduling"]["provisioningModel"] == "STANDARD"
    assert head["serviceAccounts"] == [{"email": ACCOUNT, "scopes": SCOPES}]
    assert "/family/ubuntu-2404-lts-amd64" in head["disks"][0]["initializeParams"]["sourceImage"]
    (instance,) = up.google.instances.values()
    assert instance["labels"]["ray-node-status"] == "up-to-date"


def test_up_makes_the_account_that_the_file_warns_of_and_nothing_else(up: Cloud) -> None:
    assert up.google.accounts.keys() == {ACCOUNT}
    roles = {binding["role"]: binding["members"] for binding in up.google.policy["bindings"]}
    names = ("compute.admin", "storage.objectAdmin", "iam.serviceAccountUser", "iam.roleViewer")
    assert roles == {f"roles/{name}": [f"serviceAccount:{ACCOUNT}"] for name in names}
    assert all(name in PATH.read_text() for name in names)
    asked = {what.rpartition("/")[2] for how, what, _ in up.google.asked if how == "POST"}
    allowed = {"token", "instances", "setLabels", "serviceAccounts"}
    assert asked == allowed | {f"{PROJECT}:getIamPolicy", f"{PROJECT}:setIamPolicy"}
    assert up.refused == ""


def test_up_runs_the_commands_of_the_file_on_the_head_alone(up: Cloud) -> None:
    up.check_run()
    up.check_reached("203.0.113.1", "fedlpp-ray")
    up.check_sent("constraints.txt", "spot_watcher.py", "auth_token", "ray_bootstrap_key.pem")


def test_get_head_ip_exec_submit_tunnels_and_the_database(up: Cloud, tmp_path: Path) -> None:
    assert "203.0.113.1" in up.ray("get-head-ip")
    up.check_exec_and_submit("sudo systemctl stop fedlpp-mlflow", tmp_path)
    up.check_tunnels_and_database()


def test_a_second_up_changes_nothing(up: Cloud) -> None:
    policies = [what for _, what, _ in up.google.asked if "setIamPolicy" in what]
    up.ray("up", "-y", "--no-restart")
    assert len(up.google.inserted()) == 1
    assert [what for _, what, _ in up.google.asked if "setIamPolicy" in what] == policies


def test_workers_are_asked_for_as_written(up: Cloud) -> None:
    line = [sys.executable, "-c", LAUNCH, str(up.file)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    on_demand, spot = up.google.inserted()[1:]
    for body in (on_demand, spot):
        common(body)
        assert body["machineType"] == "zones/us-west1-a/machineTypes/g2-standard-8"
        assert body["serviceAccounts"] == [{"email": WORKERS, "scopes": SCOPES}]
        assert body["scheduling"]["onHostMaintenance"] == "TERMINATE"
    assert on_demand["scheduling"]["provisioningModel"] == "STANDARD"
    assert spot["scheduling"]["provisioningModel"] == "SPOT"
    assert spot["scheduling"]["instanceTerminationAction"] == "DELETE"
    assert spot["labels"]["ray-user-node-type"] == "gpu_spot"


def test_down_leaves_nothing(up: Cloud) -> None:
    assert len(up.google.instances) == 3
    up.ray("down", "-y")
    assert up.google.instances == {}
    assert up.refused == ""
