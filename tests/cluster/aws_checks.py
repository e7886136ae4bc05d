"""What a cluster file must hold beyond Ray's own schema, one small function per rule.

Ray's schema accepts a misspelt `InstanceType`, a type whose max is below its min, a list of
commands left to its nightly defaults and a head open to the world. Each check here returns the
problems it finds as sentences, so an empty list means the rule is kept.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray.autoscaler
import yaml
from botocore.loaders import Loader
from botocore.model import ListShape, ServiceModel, Shape, StringShape, StructureShape
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

Config = dict[str, Any]
PLACEHOLDER = re.compile(r"(?:[a-z]+-)?REPLACE_[A-Z_]+")
COMMAND_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# Ray takes this key out and puts one SubnetId in (AWSNodeProvider._create_node) ...
RAY_ONLY_KEYS = {"SubnetIds"}
# ... and overwrites these, so a value in the file would be silently lost.
RAY_OVERWRITES = {"MinCount", "MaxCount", "SubnetId"}
NIGHTLY_MARKS = ("nightly", "cp310", "ray-wheels", "3.0.0.dev")


@dataclass(frozen=True)
class ClusterFile:
    """A parsed cluster file with what it refers to."""

    config: Config
    constraints: str
    root: Path

    @property
    def node_types(self) -> dict[str, Config]:
        """Every node type, by name."""
        types: dict[str, Config] = self.config["available_node_types"]
        return types

    @property
    def head(self) -> Config:
        """The head's node type."""
        return self.node_types[self.config["head_node_type"]]

    @property
    def workers(self) -> dict[str, Config]:
        """Every node type but the head's."""
        return {k: v for k, v in self.node_types.items() if k != self.config["head_node_type"]}

    def commands(self, *lists: str) -> list[str]:
        """Every command of the given lists (of all lists, when none is given)."""
        return [c for name in lists or COMMAND_LISTS for c in self.config.get(name) or []]


def load(path: Path) -> ClusterFile:
    """Parse a cluster file; the JSON round trip undoes the sharing between YAML aliases."""
    root = path.resolve().parent.parent
    constraints = root / "constraints.txt"
    return ClusterFile(
        config=json.loads(json.dumps(yaml.safe_load(path.read_text()))),
        constraints=constraints.read_text() if constraints.exists() else "",
        root=root,
    )


def strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a nested value (keys included) with the path that leads to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}.{key}".lstrip("."), str(key)
            yield from strings(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from strings(item, f"{where}[{i}]")
    elif isinstance(value, str):
        yield where, value


def placeholders(config: Config) -> dict[str, list[str]]:
    """Each placeholder in the file, with the places that hold it."""
    found: dict[str, list[str]] = {}
    for where, text in strings(config):
        for name in PLACEHOLDER.findall(text):
            found.setdefault(name, []).append(where)
    return found


def is_spot(node_type: Config) -> bool:
    """Whether a node type asks for spot instances."""
    options = node_type["node_config"].get("InstanceMarketOptions", {})
    return bool(options.get("MarketType") == "spot")


def ray_start(file: ClusterFile, commands: str) -> str:
    """The `ray start` command of a list ('' when there is none)."""
    return next((c for c in file.commands(commands) if "ray start" in c), "")


def check_schema(file: ClusterFile) -> list[str]:
    """Ray itself accepts the file."""
    try:
        validate_config(prepare_config(json.loads(json.dumps(file.config))))
    except (ValidationError, ValueError, KeyError, RuntimeError) as error:
        return [f"Ray rejects the file: {str(error).splitlines()[0]}"]
    return []


def check_no_defaults(file: ClusterFile) -> list[str]:
    """Nothing is left to Ray's aws/defaults.yaml, and none of its nightly build comes through."""
    path = Path(ray.autoscaler.__file__).parent / "aws" / "defaults.yaml"
    defaults: Config = yaml.safe_load(path.read_text())
    problems = [f"{key} is left to Ray's defaults" for key in defaults.keys() - file.config.keys()]
    for name in COMMAND_LISTS:
        if not isinstance(file.config.get(name), list):
            problems.append(f"{name} is not a list")
    merged = json.dumps(prepare_config(json.loads(json.dumps(file.config))))
    return problems + [f"'{mark}' after the merge" for mark in NIGHTLY_MARKS if mark in merged]


def check_worker_limits(file: ClusterFile) -> list[str]:
    """Limits are written out, agree with each other and let the cluster fall to nothing."""
    problems = []
    total = file.config["max_workers"]
    for name, kind in file.node_types.items():
        low, high = kind.get("min_workers"), kind.get("max_workers")
        if low is None or high is None:
            problems.append(f"{name} lacks min_workers or max_workers")
        elif not 0 <= low <= high <= total:
            problems.append(f"{name}: not 0 <= {low} <= {high} <= {total}")
        elif low:
            problems.append(f"{name}: {low} nodes cost money while nothing runs")
    if sum(kind.get("max_workers") or 0 for kind in file.workers.values()) < total:
        problems.append(f"the types together never reach max_workers {total}")
    return problems


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
    if is_spot(file.head):
        return ["the head is a spot instance: its loss ends the sweep"]
    spot = {k: v for k, v in file.workers.items() if is_spot(v)}
    rest = {k: v for k, v in file.workers.items() if not is_spot(v)}
    if not spot or not rest:
        return ["there is no spot type, or no on-demand fallback"]
    problems = []
    if min(v.get("priority", 0) for v in spot.values()) <= max(
        v.get("priority", 0) for v in rest.values()
    ):
        problems.append("an on-demand type has the priority of a spot type, or more")
    shapes = [{v["node_config"]["InstanceType"] for v in kinds.values()} for kinds in (spot, rest)]
    if shapes[0] != shapes[1]:
        problems.append("spot and fallback differ in size, so priority does not decide")
    return problems


def check_head(file: ClusterFile) -> list[str]:
    """The head runs no work."""
    if file.head["resources"].get("CPU") != 0 or file.head["resources"].get("GPU"):
        return ["trials may be placed on the head"]
    return []


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


def check_token(file: ClusterFile) -> list[str]:
    """Every node has the token and asks for it."""
    problems = []
    if "~/.ray/auth_token" not in file.config.get("file_mounts", {}):
        problems.append("the token is not copied to the nodes")
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not re.search(r"RAY_AUTH_MODE=token(;| &&)? ray start", ray_start(file, name)):
            problems.append(f"{name}: Ray starts without token authentication")
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


def check_versions(file: ClusterFile) -> list[str]:
    """Versions come from constraints.txt, which must suit a machine other than its author's."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;#]+)", file.constraints, re.MULTILINE))
    problems = [] if "ray" in pins else ["constraints.txt does not pin ray"]
    problems += [f"{k}=={v} exists only for one build" for k, v in pins.items() if "+" in v]
    for command in file.commands():
        if "pip install" in command and not re.search(r"-c \S*constraints\.txt", command):
            problems.append(f"installs without constraints: {command}")
        for name, version in re.findall(r"([\w.-]+)(?:\[[\w,]*\])?==([^\s'\"]+)", command):
            if pins.get(name) != version:
                problems.append(f"{name}=={version} is not what constraints.txt says")
        if re.search(r"https?://|index-url|git\+", command):
            problems.append(f"installs from a place of its own: {command}")
    return problems


def check_mounts(file: ClusterFile) -> list[str]:
    """Mounts are single files that exist: Ray hashes all below a folder and restarts on change."""
    problems = []
    for remote, local in file.config.get("file_mounts", {}).items():
        if local.startswith("~/"):
            continue
        if not remote.startswith("~/") or Path(local).is_absolute():
            problems.append(f"{remote}: {local} ties the file to one machine")
        elif not (file.root / local).is_file():
            problems.append(f"{local} is not a file of the repository")
    if any("mlflow.db" in pattern for pattern in file.config.get("rsync_exclude", [])):
        problems.append("`ray rsync-down` would leave mlflow.db behind")
    return problems


def check_mlflow(file: ClusterFile) -> list[str]:
    """MLflow runs on the head's loopback as a unit, with its store outside of every mount."""
    commands = file.commands("head_start_ray_commands")
    server = next((c for c in commands if "mlflow server" in c), "")
    if not server:
        return ["MLflow is not started on the head"]
    wanted = ("systemd-run", "--collect", "Restart=always", "--host 127.0.0.1", "--port 5000")
    problems = [f"mlflow server: no {part}" for part in wanted if part not in server]
    if not re.search(r"--artifacts-destination s3://\S+", server):
        problems.append("artifacts are kept on the head's disk")
    store = re.search(r"--backend-store-uri sqlite:///(/\S+)", server)
    mounts = [m.replace("~", "/home/ubuntu") for m in file.config.get("file_mounts", {})]
    if not store or any(store[1].startswith(m.rstrip("/") + "/") for m in mounts):
        problems.append("the store is not an absolute sqlite path outside of the mounts")
    if not any("systemctl stop fedlpp-mlflow" in c for c in commands[: commands.index(server)]):
        problems.append("a second `ray up` finds the unit's name taken")
    return problems


def check_shell(file: ClusterFile) -> list[str]:
    """Bash can parse every command."""
    problems = []
    for command in file.commands():
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False)
        if done.returncode:
            problems.append(f"not a shell command: {command}")
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
    check_shell,
)
