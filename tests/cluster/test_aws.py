"""`cluster/aws.yaml` is what it says it is, and each check of that can fail.

Offline and without credentials. Whether AWS agrees is for a real launch to say (docs/clusters.md).
"""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from aws_checks import CHECKS
from cluster_file import ClusterFile, load, placeholders
from mutations import Mutation, drop, edit, put
from ray.autoscaler._private.util import prepare_config

PATH = Path(__file__).parents[2] / "cluster" / "aws.yaml"
PINS = "ray==2.60.0\ntorch==2.13.0\n"
BY_NAME = {check.__name__.removeprefix("check_"): check for check in CHECKS}


@pytest.fixture
def shipped() -> ClusterFile:
    return load(PATH)


TYPES = "available_node_types"
HEAD, SPOT, ON_DEMAND = (f"{TYPES} {name}" for name in ("head_cpu", "gpu_spot", "gpu_on_demand"))
DISK = "node_config BlockDeviceMappings 0"
START, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
BREAKS: list[tuple[str, Mutation]] = [
    ("schema", put("max_worker", 8)),
    ("schema", put(f"{SPOT} max_nodes", 8)),
    ("schema", put("head_node_type", "head")),
    ("schema", put(f"{SPOT} min_workers", 9)),
    ("schema", drop(f"{SPOT} resources")),
    ("schema", put(f"{SPOT} resources", {"GPU": 0.5})),
    *(("no_defaults", drop(name)) for name in ("setup_commands", "head_setup_commands", START)),
    ("no_defaults", drop("worker_setup_commands")),
    ("no_defaults", drop("docker")),
    ("no_defaults", drop("idle_timeout_minutes")),
    ("no_defaults", put("initialization_commands", "true")),
    ("no_defaults", put("setup_commands 0", "pip install ray-nightly-cp310.whl")),
    ("worker_limits", put(f"{SPOT} min_workers", 1)),
    ("worker_limits", put(f"{ON_DEMAND} max_workers", -1)),
    ("worker_limits", put(f"{SPOT} max_workers", 9)),
    ("worker_limits", put(f"{SPOT} max_workers", 1)),
    ("worker_limits", drop(f"{SPOT} max_workers")),
    ("node_config", put(f"{SPOT} node_config InstanceTyp", "g6.2xlarge")),
    ("node_config", put(f"{SPOT} node_config InstanceType", "g6.2xlarg")),
    ("node_config", put(f"{HEAD} {DISK} Ebs Encrypt", True)),
    ("node_config", put(f"{HEAD} {DISK} Ebs VolumeSize", "100")),
    ("node_config", put(f"{HEAD} {DISK} Ebs VolumeType", "gp4")),
    ("node_config", put(f"{HEAD} {DISK} EBS", {})),
    ("node_config", put(f"{SPOT} node_config MetadataOptions HttpToken", "required")),
    ("node_config", put(f"{SPOT} node_config InstanceMarketOptions MarketTyp", "spot")),
    ("node_config", put(f"{SPOT} node_config InstanceMarketOptions MarketType", "Spot")),
    ("node_config", put(f"{HEAD} node_config IamInstanceProfile", "REPLACE_HEAD_PROFILE")),
    ("node_config", put(f"{SPOT} node_config MaxCount", 4)),
    ("images", drop(f"{SPOT} node_config ImageId")),
    ("images", put(f"{HEAD} node_config ImageId", "latest_dlami")),
    ("network", edit(START, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")),
    ("network", edit(START, " --dashboard-host=127.0.0.1", "")),
    ("network", edit(START, "--host 127.0.0.1", "--host 0.0.0.0")),
    ("network", put("provider security_group", {"GroupName": "open"})),
    ("network", drop(f"{SPOT} node_config SecurityGroupIds")),
    ("metadata", put(f"{SPOT} node_config MetadataOptions HttpTokens", "optional")),
    ("metadata", drop(f"{ON_DEMAND} node_config MetadataOptions")),
    ("metadata", put(f"{HEAD} node_config MetadataOptions HttpPutResponseHopLimit", 1)),
    ("volumes", put(f"{SPOT} {DISK} Ebs Encrypted", False)),
    ("volumes", drop(f"{HEAD} node_config BlockDeviceMappings")),
    ("volumes", put(f"{ON_DEMAND} {DISK} Ebs DeleteOnTermination", False)),
    ("market", put(f"{HEAD} node_config InstanceMarketOptions", {"MarketType": "spot"})),
    ("market", put(f"{ON_DEMAND} priority", 10)),
    ("market", drop(f"{SPOT} priority")),
    ("market", drop(ON_DEMAND)),
    ("market", drop(f"{SPOT} node_config InstanceMarketOptions")),
    ("market", put(f"{ON_DEMAND} node_config InstanceType", "g6.4xlarge")),
    ("head", put(f"{HEAD} resources", {})),
    ("head", put(f"{HEAD} resources", {"CPU": 0, "GPU": 1})),
    ("profiles", drop(f"{HEAD} node_config IamInstanceProfile")),
    ("profiles", drop(f"{SPOT} node_config IamInstanceProfile")),
    ("profiles", put(f"{SPOT} node_config IamInstanceProfile", {"Name": "REPLACE_HEAD_PROFILE"})),
    ("token", drop("file_mounts ~/.ray/auth_token")),
    ("token", edit(START, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")),
    ("token", edit("worker_start_ray_commands", "RAY_AUTH_MODE=token ", "")),
    ("termination", put("provider cache_stopped_nodes", True)),
    ("termination", drop("provider cache_stopped_nodes")),
    ("termination", put("idle_timeout_minutes", 600)),
    ("termination", put("provider availability_zone", "us-west-2a")),
    ("termination", put("provider region", "eu-central-1")),
    ("key", drop("auth ssh_private_key")),
    ("key", drop(f"{SPOT} node_config KeyName")),
    ("versions", edit("setup_commands", "-c ~/fedlpp/constraints.txt ", "")),
    ("versions", put("setup_commands 0", "pip install -c constraints.txt 'ray[default]==2.59.0'")),
    ("versions", put("setup_commands 0", "pip install -c constraints.txt git+ssh://host/ray")),
    ("mounts", put("file_mounts", {"~/fedlpp": "."})),
    ("mounts", put("file_mounts", {"~/fedlpp/a.txt": "no_such_file.txt"})),
    ("mounts", put("file_mounts", {"~/fedlpp/a.txt": "/etc/hostname"})),
    ("mounts", put("rsync_exclude", ["mlflow.db*"])),
    ("mlflow", put(START, ["ray start --head"])),
    ("mlflow", edit(START, "--host 127.0.0.1", "--host $(hostname)")),
    ("mlflow", edit(START, "sqlite:////home/ubuntu/mlflow/", "sqlite:///")),
    ("mlflow", put("file_mounts ~/mlflow", "mlflow")),
    ("mlflow", edit(START, "--artifacts-destination s3://", "--artifacts-destination ./")),
    ("mlflow", edit(START, "systemctl stop fedlpp-mlflow", "true")),
    ("watcher", edit(WORKER, "spot_watcher.py aws", "spot_watcher.py gcp")),
    ("watcher", edit(WORKER, "systemctl stop fedlpp-spot-watcher", "true")),
    ("watcher", edit(WORKER, "Restart=on-failure", "Restart=no")),
    ("watcher", edit(WORKER, "spot_watcher.py", "other.py")),
    ("watcher", drop("file_mounts ~/fedlpp/spot_watcher.py")),
    ("reports", edit(START, "--disable-usage-stats", "")),
    ("shell", put("setup_commands 0", "for i in 1 2; do echo")),
]


@pytest.mark.parametrize("name", BY_NAME)
def test_the_shipped_file_keeps_the_rule(name: str, shipped: ClusterFile) -> None:
    assert BY_NAME[name](shipped) == []


@pytest.mark.parametrize(
    ("name", "mutate"), BREAKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BREAKS)]
)
def test_the_check_catches_a_broken_copy(name: str, mutate: Mutation, shipped: ClusterFile) -> None:
    whole = replace(shipped, constraints=PINS)
    broken = replace(whole, config=json.loads(json.dumps(shipped.config)))
    mutate(broken.config)
    assert set(BY_NAME[name](broken)) - set(BY_NAME[name](whole))


def test_every_check_has_a_copy_that_breaks_it() -> None:
    assert {name for name, _ in BREAKS} == set(BY_NAME)


@pytest.mark.parametrize("constraints", ["", "torch==2.13.0\n", "ray==2.60.0\ntorch==2.13.0+cpu\n"])
def test_constraints_that_do_not_suit_a_cluster(constraints: str, shipped: ClusterFile) -> None:
    assert BY_NAME["versions"](replace(shipped, constraints=constraints))


def test_placeholders_are_these_and_no_others(shipped: ClusterFile) -> None:
    head, spot, fallback = (p.replace(" ", ".") for p in (HEAD, SPOT, ON_DEMAND))
    assert placeholders(shipped.config) == {
        "sg-REPLACE_GROUP": [
            f"{kind}.node_config.SecurityGroupIds[0]" for kind in (head, fallback, spot)
        ],
        "REPLACE_HEAD_PROFILE": [f"{head}.node_config.IamInstanceProfile.Name"],
        "REPLACE_WORKER_PROFILE": [
            f"{kind}.node_config.IamInstanceProfile.Name" for kind in (fallback, spot)
        ],
        "REPLACE_BUCKET": [f"{START}[2]"],
    }


def test_the_header_explains_every_placeholder_and_command(shipped: ClusterFile) -> None:
    header = PATH.read_text().split("cluster_name:")[0]
    wanted = [*placeholders(shipped.config), "ray up -y", "ray dashboard", "ray job submit"]
    assert [w for w in [*wanted, "ray down -y", "COSTS MONEY"] if w not in header] == []


def test_setup_survives_the_second_merge_of_autoscaler_v2(shipped: ClusterFile) -> None:
    """The head prepares the file once more, so workers run setup twice, in the same order."""
    once = prepare_config(shipped.config)
    twice = prepare_config(once)
    setup, worker = shipped.config["setup_commands"], shipped.config["worker_setup_commands"]
    assert once["worker_setup_commands"] == setup + worker
    assert twice["worker_setup_commands"] == setup + setup + worker


def test_the_extras_that_setup_asks_for_exist_and_bring_the_dashboard(shipped: ClusterFile) -> None:
    project = tomllib.loads((shipped.root / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"--extra (\S+)", " ".join(shipped.commands("setup_commands")))
    wanted = [line for extra in extras for line in project["optional-dependencies"][extra]]
    assert [name for name in ("ray[default]", "boto3") if name not in " ".join(wanted)] == []
    assert any(line.startswith("mlflow") for line in project["dependencies"])
