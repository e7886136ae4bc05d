"""`cluster/gcp.yaml` is what it says it is, and each check of that can fail. Offline."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from cluster_file import ClusterFile, load, placeholders
from gcp_checks import CHECKS
from mutations import Mutation, drop, edit, put

PATH = Path(__file__).parents[2] / "cluster" / "gcp.yaml"
BY_NAME = {check.__name__.removeprefix("check_"): check for check in CHECKS}
TYPES = "available_node_types"
HEAD, SPOT, ON_DEMAND = (f"{TYPES} {name}" for name in ("head_cpu", "gpu_spot", "gpu_on_demand"))
START, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
SCHEDULING = f"{SPOT} node_config scheduling"
BREAKS: list[tuple[str, Mutation]] = [
    ("schema", put("max_worker", 8)),
    ("schema", drop(f"{SPOT} resources")),
    ("no_defaults", drop("head_setup_commands")),
    ("no_defaults", drop(START)),
    ("worker_limits", put(f"{SPOT} min_workers", 1)),
    ("worker_limits", put(f"{SPOT} max_workers", 9)),
    ("node_config", put(f"{SPOT} node_config machinetype", "g2-standard-8")),
    ("node_config", put(f"{SCHEDULING} preemptable", True)),
    ("node_config", put(f"{SCHEDULING} provisioningModel", "spot")),
    ("network", edit(START, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")),
    ("network", drop(f"{SPOT} node_config tags")),
    ("network", drop(f"{HEAD} node_config networkInterfaces")),
    ("disks", put(f"{SPOT} node_config disks 0 autoDelete", False)),
    ("disks", drop(f"{HEAD} node_config disks")),
    ("disks", put(f"{HEAD} node_config disks 0 initializeParams sourceImage", "ubuntu")),
    ("market", put(f"{HEAD} node_config scheduling provisioningModel", "SPOT")),
    ("market", put(f"{ON_DEMAND} priority", 10)),
    ("market", drop(ON_DEMAND)),
    ("market", put(f"{ON_DEMAND} node_config machineType", "g2-standard-12")),
    ("market", put(f"{SCHEDULING} instanceTerminationAction", "STOP")),
    ("market", put(f"{SPOT} resources", {})),
    ("head", put(f"{HEAD} resources", {"CPU": 4})),
    ("accounts", drop(f"{SPOT} node_config serviceAccounts")),
    ("accounts", put(f"{HEAD} node_config serviceAccounts", [])),
    ("key", drop("auth ssh_private_key")),
    ("key", put(f"{SPOT} node_config metadata items", [])),
    ("token", drop("file_mounts ~/.ray/auth_token")),
    ("token", edit(WORKER, "RAY_AUTH_MODE=token ray", "ray")),
    ("termination", put("provider cache_stopped_nodes", True)),
    ("termination", put("idle_timeout_minutes", 600)),
    ("termination", put("provider availability_zone", "us-west1-a,us-west1-b")),
    ("versions", edit("setup_commands", "-c ~/fedlpp/constraints.txt ", "")),
    ("mounts", put("file_mounts", {"~/fedlpp": "."})),
    ("mlflow", edit(START, "--host 127.0.0.1", "--host $(hostname)")),
    ("mlflow", edit(START, "--artifacts-destination gs://", "--artifacts-destination ./")),
    ("watcher", edit(WORKER, "spot_watcher.py gcp", "spot_watcher.py aws")),
    ("reports", edit(START, "--disable-usage-stats", "")),
    ("shell", put("setup_commands 0", "for i in 1 2; do echo")),
]
DISCOVERED: list[Mutation] = [
    put(f"{SPOT} node_config disks 0 boots", True),
    put(f"{SPOT} node_config disks", {"boot": True}),
    put(f"{SCHEDULING} provisioningModel", "SPOTTY"),
    put(f"{SPOT} node_config networkInterfaces 0 accessConfigs 0 typ", "x"),
]


@pytest.fixture
def shipped() -> ClusterFile:
    return load(PATH)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_shipped_file_keeps_the_rule(name: str, shipped: ClusterFile) -> None:
    assert BY_NAME[name](shipped) == []


def broken(shipped: ClusterFile, mutate: Mutation) -> ClusterFile:
    copy = replace(shipped, config=json.loads(json.dumps(shipped.config)))
    mutate(copy.config)
    return copy


@pytest.mark.parametrize(
    ("name", "mutate"), BREAKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BREAKS)]
)
def test_the_check_catches_a_broken_copy(name: str, mutate: Mutation, shipped: ClusterFile) -> None:
    assert BY_NAME[name](broken(shipped, mutate))


@pytest.mark.skipif(
    not find_spec("googleapiclient"), reason="needs google-api-python-client (extra gcp)"
)
@pytest.mark.parametrize("mutate", DISCOVERED)
def test_googles_own_description_catches_a_broken_copy(
    mutate: Mutation, shipped: ClusterFile
) -> None:
    assert BY_NAME["discovery"](broken(shipped, mutate))


def test_every_check_has_a_copy_that_breaks_it() -> None:
    assert {name for name, _ in BREAKS} | {"discovery"} == set(BY_NAME)


def test_the_header_explains_every_placeholder_and_command(shipped: ClusterFile) -> None:
    header = PATH.read_text().split("cluster_name:")[0]
    wanted = [*placeholders(shipped.config), "ray up -y", "ray dashboard", "ray job submit"]
    assert [w for w in [*wanted, "ray down -y", "COSTS MONEY"] if w not in header] == []
