"""What `cluster/aws.yaml` names, made in a stand-in for AWS."""

import json
from typing import Any

from cluster_file import ClusterFile, Config


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
