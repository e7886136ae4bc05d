"""What `cluster/aws.yaml` must hold: the rules of `cluster_file`, and those of AWS.

Ray's schema accepts a misspelt `InstanceType`, a type whose max is below its min, a list of
commands left to its nightly defaults and a head open to the world. Each check here returns the
problems it finds as sentences, so an empty list means the rule is kept.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from botocore.loaders import Loader
from botocore.model import ListShape, ServiceModel, Shape, StringShape, StructureShape
from botocore.validate import ParamValidator
from cluster_file import (
    ClusterFile,
    Config,
    check_head,
    check_mlflow,
    check_mounts,
    check_no_defaults,
    check_reports,
    check_schema,
    check_shell,
    check_spot_first,
    check_token,
    check_versions,
    check_watcher,
    check_worker_limits,
    ray_start,
    strings,
)

# Ray takes this key out and puts one SubnetId in (AWSNodeProvider._create_node) ...
RAY_ONLY_KEYS = {"SubnetIds"}
# ... and overwrites these, so a value in the file would be silently lost.
RAY_OVERWRITES = {"MinCount", "MaxCount", "SubnetId"}


def is_spot(node_type: Config) -> bool:
    """Whether a node type asks for spot instances."""
    options = node_type["node_config"].get("InstanceMarketOptions", {})
    return bool(options.get("MarketType") == "spot")


@cache
def run_instances_shape() -> StructureShape:
    """The input of EC2 RunInstances, from the model that botocore ships."""
    loader = Loader([Loader.BUILTIN_DATA_PATH], include_default_search_paths=False)
    model = ServiceModel(loader.load_service_model("ec2", "service-2"), "ec2")
    return model.operation_model("RunInstances").input_shape


def enum_problems(value: Any, shape: Shape, where: str) -> Iterator[str]:
    """Strings outside of the values that the service model lists (botocore leaves them be)."""
    if isinstance(shape, StructureShape) and isinstance(value, dict):
        for key in value.keys() & shape.members.keys():
            yield from enum_problems(value[key], shape.members[key], f"{where}.{key}")
    elif isinstance(shape, ListShape) and isinstance(value, list):
        for i, item in enumerate(value):
            yield from enum_problems(item, shape.member, f"{where}[{i}]")
    elif isinstance(shape, StringShape) and shape.enum and value not in shape.enum:
        yield f"{where}: {value!r} is not a value that EC2 knows"


def check_node_config(file: ClusterFile) -> list[str]:
    """Every key and value of node_config, however deep, is one that EC2 RunInstances takes."""
    problems = []
    shape = run_instances_shape()
    for name, kind in file.node_types.items():
        node = kind["node_config"]
        problems += [f"{name}: Ray overwrites {key}" for key in node.keys() & RAY_OVERWRITES]
        sent = {k: v for k, v in node.items() if k not in RAY_ONLY_KEYS}
        report = ParamValidator().validate({**sent, "MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            problems.append(f"{name}: {report.generate_report()}")
        problems += enum_problems(sent, shape, name)
    return problems


def check_images(file: ClusterFile) -> list[str]:
    """Every type names its image: Ray's default is Ubuntu 18.04."""
    good = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:/aws/service/\S+/ami-id")
    return [
        f"{name}: no image that EC2 can resolve"
        for name, kind in file.node_types.items()
        if not good.fullmatch(kind["node_config"].get("ImageId", ""))
    ]


def check_network(file: ClusterFile) -> list[str]:
    """Nothing listens on, or is opened to, the world."""
    problems = [f"{w}: {t}" for w, t in strings(file.config) if "0.0.0.0" in t or "::/0" in t]
    if "--dashboard-host=127.0.0.1" not in ray_start(file, "head_start_ray_commands"):
        problems.append("the dashboard is not bound to loopback")
    if "security_group" in file.config["provider"]:
        problems.append("provider.security_group lets Ray open port 22 to everyone")
    for name, kind in file.node_types.items():
        if not kind["node_config"].get("SecurityGroupIds"):
            problems.append(f"{name}: Ray makes a security group that opens port 22 to everyone")
    return problems


def check_metadata(file: ClusterFile) -> list[str]:
    """IMDSv2 is required, with two hops for containers."""
    problems = []
    for name, kind in file.node_types.items():
        options = kind["node_config"].get("MetadataOptions", {})
        if options.get("HttpTokens") != "required":
            problems.append(f"{name}: IMDSv1 is allowed")
        if options.get("HttpPutResponseHopLimit") != 2:
            problems.append(f"{name}: the hop limit of IMDS is not 2")
    return problems


def check_volumes(file: ClusterFile) -> list[str]:
    """Every disk is gp3, encrypted and gone with its node."""
    wanted = {"VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    problems = []
    for name, kind in file.node_types.items():
        disks = kind["node_config"].get("BlockDeviceMappings", [])
        if not disks:
            problems.append(f"{name}: the disk is left to the image")
        for disk in disks:
            ebs = disk.get("Ebs", {})
            problems += [f"{name}: {k} is not {v}" for k, v in wanted.items() if ebs.get(k) != v]
    return problems


def check_market(file: ClusterFile) -> list[str]:
    """Workers are spot first, with an on-demand fallback that differs in nothing else."""
    problems = check_spot_first(file, is_spot)
    spot = {k: v for k, v in file.workers.items() if is_spot(v)}
    rest = {k: v for k, v in file.workers.items() if not is_spot(v)}
    shapes = [{v["node_config"]["InstanceType"] for v in kinds.values()} for kinds in (spot, rest)]
    if shapes[0] != shapes[1]:
        problems.append("spot and fallback differ in size, so priority does not decide")
    return problems


def check_profiles(file: ClusterFile) -> list[str]:
    """Head and workers have instance profiles of their own, and not the same one."""
    profiles = {
        name: json.dumps(kind["node_config"].get("IamInstanceProfile"))
        for name, kind in file.node_types.items()
    }
    problems = [f"{name}: no instance profile" for name, p in profiles.items() if p == "null"]
    head = profiles[file.config["head_node_type"]]
    if any(profiles[name] == head for name in file.workers):
        problems.append("workers hold the head's rights to launch instances")
    return problems


def check_termination(file: ClusterFile) -> list[str]:
    """Idle nodes are terminated rather than stopped, and capacity is sought in several zones."""
    provider, problems = file.config["provider"], []
    if provider.get("cache_stopped_nodes") is not False:
        problems.append("stopped nodes keep their disks, which cost money")
    if not 0 < file.config.get("idle_timeout_minutes", 0) <= 60:
        problems.append("idle nodes live for more than an hour")
    zones = provider.get("availability_zone", "").split(",")
    if len(set(zones)) < 2 or not all(z.strip().startswith(provider["region"]) for z in zones):
        problems.append(f"not several zones of {provider['region']}: {zones}")
    return problems


def check_key(file: ClusterFile) -> list[str]:
    """The cluster has a key pair of its own, for Ray copies the private half to the head."""
    problems = [] if file.config["auth"].get("ssh_private_key") else ["Ray picks a shared key"]
    for name, kind in file.node_types.items():
        if not kind["node_config"].get("KeyName"):
            problems.append(f"{name}: no KeyName to match auth.ssh_private_key")
    return problems


CHECKS: tuple[Callable[[ClusterFile], list[str]], ...] = (
    check_schema,
    check_no_defaults,
    check_worker_limits,
    check_node_config,
    check_images,
    check_network,
    check_metadata,
    check_volumes,
    check_market,
    check_head,
    check_profiles,
    check_token,
    check_termination,
    check_key,
    check_versions,
    check_mounts,
    check_mlflow,
    check_watcher,
    check_reports,
    check_shell,
)
