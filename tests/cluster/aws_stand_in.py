"""AWS on loopback, answered by moto; and what `cluster/aws.yaml` names, made there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster_file import ClusterFile, Config


def log_in(patch: pytest.MonkeyPatch) -> None:
    """Make this process, and those that it starts, somebody whom only a stand-in knows."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        patch.setenv(name, "testing")
    patch.delenv("AWS_PROFILE", raising=False)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@contextmanager
def aws(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve it to this process and those that it starts; yields its host and port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "{}:{}".format(*server.get_host_and_port())
    log_in(patch)
    patch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    try:
        yield endpoint
    finally:
        server.stop()


def fill_in(file: ClusterFile) -> Config:
    """Make a group, a key and two profiles in moto; put their names where the placeholders are."""
    import boto3

    region = file.config["provider"]["region"]
    ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam", region_name=region)
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="fedlpp", Description="x", VpcId=vpc)["GroupId"]
    for name in ("head-profile", "worker-profile"):
        iam.create_instance_profile(InstanceProfileName=name)
    ec2.create_key_pair(KeyName="fedlpp-ray")
    text = json.dumps(file.config).replace("sg-REPLACE_GROUP", group)
    text = text.replace("REPLACE_HEAD_PROFILE", "head-profile").replace("REPLACE_BUCKET", "bucket")
    filled: Config = json.loads(text.replace("REPLACE_WORKER_PROFILE", "worker-profile"))
    return filled


def tags_of(instance: dict[str, Any]) -> dict[str, str]:
    """An instance's tags by key."""
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
