"""`ray up`, `get-head-ip`, `exec`, `submit`, `down` of `cluster/aws.yaml` against a moto server.

moto answers for AWS on loopback; `ssh` and `rsync` only note how they were called. Needs
moto, boto3 and `ray[default]`; no network, no credentials.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from aws_stand_in import aws, fill_in, tags_of
from cluster_file import load
from ray_commands import ROOT, Commands, prepare

boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto.server", reason="needs moto[server] (extra cluster-tests)")
pytestmark = pytest.mark.slow

PATH = ROOT / "cluster" / "aws.yaml"


@dataclass(frozen=True)
class Cloud(Commands):
    """And what moto has of it."""

    region: str

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """The instances in the given states."""
        ec2 = boto3.client("ec2", region_name=self.region)
        wanted = [{"Name": "instance-state-name", "Values": list(states)}]
        found = ec2.describe_instances(Filters=wanted)["Reservations"]
        return [instance for reservation in found for instance in reservation["Instances"]]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, aws(patch):
        prepare(home, "fedlpp-ray.pem", patch)
        config = fill_in(load(PATH))
        (home / "aws.yaml").write_text(yaml.safe_dump(config))
        yield Cloud(home, home / "aws.yaml", config["provider"]["region"])


@pytest.fixture(scope="module")
def up(cloud: Cloud) -> Cloud:
    cloud.ray("up", "-y")
    return cloud


def test_up_starts_the_head_as_written_and_no_worker(up: Cloud) -> None:
    (head,) = up.instances("pending", "running")
    tags = tags_of(head)
    assert tags["ray-cluster-name"] == tags["project"] == "fedlpp-ray"
    assert tags["ray-node-type"] == "head"
    assert tags["ray-user-node-type"] == "head_cpu"
    assert tags["ray-node-status"] == "up-to-date"
    assert head["InstanceType"] == "m7i.xlarge"
    assert "InstanceLifecycle" not in head
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    assert head["MetadataOptions"]["HttpPutResponseHopLimit"] == 2
    assert head["IamInstanceProfile"]["Arn"].endswith("/head-profile")
    assert [group["GroupName"] for group in head["SecurityGroups"]] == ["fedlpp"]
    assert head["KeyName"] == "fedlpp-ray"


def test_up_opens_no_port_and_makes_no_group_or_key(up: Cloud) -> None:
    ec2 = boto3.client("ec2", region_name=up.region)
    groups = {g["GroupName"]: g for g in ec2.describe_security_groups()["SecurityGroups"]}
    assert groups.keys() == {"default", "fedlpp"}
    assert groups["fedlpp"]["IpPermissions"] == []
    assert [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]] == ["fedlpp-ray"]


def test_up_runs_the_commands_of_the_file_on_the_head(up: Cloud) -> None:
    said = up.check_run()
    start = next(line for line in said.splitlines() if "ray start --head" in line)
    assert "--dashboard-host=127.0.0.1" in start
    assert "mlflow server --host 127.0.0.1 --port 5000" in said
    assert "nightly" not in said


def test_up_copies_the_mounts_and_the_token(up: Cloud) -> None:
    up.check_sent(
        "constraints.txt",
        "pyproject.toml",
        "spot_watcher.py",
        "auth_token",
        "ray_bootstrap_config.yaml",
        "ray_bootstrap_key.pem",
    )


def test_only_the_head_was_to_be_reached_and_by_the_clusters_key(up: Cloud) -> None:
    (head,) = up.instances("pending", "running")
    up.check_reached(head["PublicIpAddress"], "fedlpp-ray.pem")


def test_get_head_ip_exec_and_submit(up: Cloud, tmp_path: Path) -> None:
    (head,) = up.instances("pending", "running")
    assert head["PublicIpAddress"] in up.ray("get-head-ip")
    up.check_exec_and_submit("journalctl -u fedlpp-mlflow", tmp_path)


def test_the_tunnels_and_the_way_back_of_the_database(up: Cloud) -> None:
    up.check_tunnels_and_database()


def test_a_second_up_changes_nothing(up: Cloud) -> None:
    before = [instance["InstanceId"] for instance in up.instances("pending", "running")]
    up.ray("up", "-y", "--no-restart")
    assert [i["InstanceId"] for i in up.instances("pending", "running")] == before


def test_down_leaves_nothing(up: Cloud) -> None:
    up.ray("down", "-y")
    assert up.instances("pending", "running", "stopping", "stopped") == []
    assert len(up.instances("shutting-down", "terminated")) == 1
