"""What Ray asks of AWS when it starts `cluster/aws.yaml`, answered by moto inside this process.

Needs the optional packages moto and boto3; no network, no credentials. The placeholders are filled
with things made in moto's own account first.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws_stand_in import fill_in, log_in, tags_of
from cluster_file import Config, load
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")
pytestmark = pytest.mark.slow

PATH = Path(__file__).parents[2] / "cluster" / "aws.yaml"


@pytest.fixture
def bootstrapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Config]:
    """The file as Ray completes it: subnets found, resources filled in."""
    log_in(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    logging.getLogger("ray").setLevel(logging.ERROR)
    with moto.mock_aws():
        file = load(PATH)
        yield commands._bootstrap_config(fill_in(file), no_config_cache=True)


def launch(config: Config, kind: str) -> dict[str, Any]:
    """Start one node of a type the way the autoscaler does, and describe it."""
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    node_config = config["available_node_types"][kind]["node_config"]
    (node_id,) = provider.create_node(node_config, {"ray-user-node-type": kind}, 1)
    ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
    answer = ec2.describe_instances(InstanceIds=[node_id])
    instance: dict[str, Any] = answer["Reservations"][0]["Instances"][0]
    return instance


def test_resources_and_subnets_are_filled_in(bootstrapped: Config) -> None:
    types = bootstrapped["available_node_types"]
    assert types["head_cpu"]["resources"]["CPU"] == 0
    for kind in ("gpu_spot", "gpu_on_demand"):
        assert types[kind]["resources"].items() >= {"CPU": 8, "GPU": 1}.items()
        assert types[kind]["resources"]["accelerator_type:L4"] == 1
        assert len(types[kind]["node_config"]["SubnetIds"]) == 3
    assert bootstrapped["auth"]["ssh_private_key"] == "~/.ssh/fedlpp-ray.pem"


def test_no_group_or_key_is_made_besides_ours(bootstrapped: Config) -> None:
    ec2 = boto3.client("ec2", region_name=bootstrapped["provider"]["region"])
    groups = {g["GroupName"] for g in ec2.describe_security_groups()["SecurityGroups"]}
    assert groups == {"default", "fedlpp"}
    assert [k["KeyName"] for k in ec2.describe_key_pairs()["KeyPairs"]] == ["fedlpp-ray"]


@pytest.mark.parametrize(
    ("kind", "lifecycle", "profile"),
    [
        ("head_cpu", None, "head-profile"),
        ("gpu_on_demand", None, "worker-profile"),
        ("gpu_spot", "spot", "worker-profile"),
    ],
)
def test_a_node_is_launched_as_written(
    bootstrapped: Config, kind: str, lifecycle: str | None, profile: str
) -> None:
    instance = launch(bootstrapped, kind)
    assert instance.get("InstanceLifecycle") == lifecycle
    assert instance["IamInstanceProfile"]["Arn"].endswith(profile)
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    tags = tags_of(instance)
    assert tags["ray-cluster-name"] == tags["project"] == "fedlpp-ray"
    disk = instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
    ec2 = boto3.client("ec2", region_name=bootstrapped["provider"]["region"])
    assert ec2.describe_volumes(VolumeIds=[disk])["Volumes"][0]["Encrypted"]
