"""`cluster/on_prem.yaml` is what it says it is, and each check of that can fail. Offline."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_file import (
    ClusterFile,
    check_mounts,
    check_no_defaults,
    check_reports,
    check_schema,
    check_shell,
    check_token,
    check_versions,
    load,
    placeholders,
    ray_start,
    strings,
)
from mutations import Mutation, drop, edit, put

PATH = Path(__file__).parents[2] / "cluster" / "on_prem.yaml"
START, WORKER = "head_start_ray_commands", "worker_start_ray_commands"


def check_workers(file: ClusterFile) -> list[str]:
    """All listed workers are kept: none is beyond max_workers, which Ray would leave out."""
    listed = len(file.config["provider"]["worker_ips"])
    same = file.config["max_workers"] == listed and "min_workers" not in file.config
    return [] if same else [f"max_workers is not {listed}"]


def check_head(file: ClusterFile) -> list[str]:
    """No trial on the head, and nothing of it open to the network but Ray's own ports."""
    start = ray_start(file, START)
    wanted = ("--dashboard-host=127.0.0.1", "--num-cpus=0", "--num-gpus=0")
    problems = [f"head: no {part}" for part in wanted if part not in start]
    return problems + [f"{w}: {t}" for w, t in strings(file.config) if "0.0.0.0" in t]


def check_autoscaler(file: ClusterFile) -> list[str]:
    """Autoscaler v1 on the head: v2 starts no worker of a local provider."""
    off = "RAY_enable_autoscaler_v2=0 " in ray_start(file, START)
    return [] if off else ["no worker is ever started"]


def check_mlflow(file: ClusterFile) -> list[str]:
    """MLflow is a unit of the user on loopback, its store outside of every mount."""
    commands = file.commands(START)
    server = next((c for c in commands if "mlflow server" in c), "")
    wanted = ("systemd-run --user", "--collect", "Restart=always", "--host 127.0.0.1")
    problems = [f"mlflow server: no {part}" for part in wanted if part not in server]
    store = re.search(r"--backend-store-uri sqlite:///\$HOME(/\S+)", server)
    mounts = [mount.replace("~", "") for mount in file.config.get("file_mounts", {})]
    if not store or any(store[1].startswith(mount + "/") for mount in mounts):
        problems.append("the store is not an absolute path outside of the mounts")
    if not any("systemctl --user stop fedlpp-mlflow" in command for command in commands):
        problems.append("a second `ray up` finds the unit's name taken")
    return problems


CHECKS: dict[str, Callable[[ClusterFile], list[str]]] = {
    "schema": check_schema,
    "no_defaults": check_no_defaults,
    "workers": check_workers,
    "head": check_head,
    "autoscaler": check_autoscaler,
    "mlflow": check_mlflow,
    "token": check_token,
    "versions": check_versions,
    "mounts": check_mounts,
    "reports": check_reports,
    "shell": check_shell,
}
BREAKS: list[tuple[str, Mutation]] = [
    ("schema", put("max_worker", 8)),
    ("schema", drop("provider head_ip")),
    ("schema", put("available_node_types", {"a": {}})),
    ("no_defaults", drop("setup_commands")),
    ("no_defaults", drop(START)),
    ("workers", put("max_workers", 0)),
    ("workers", put("provider worker_ips", ["10.0.0.1", "10.0.0.2"])),
    ("head", edit(START, " --dashboard-host=127.0.0.1", "")),
    ("head", edit(START, "--num-cpus=0", "")),
    ("autoscaler", edit(START, "RAY_enable_autoscaler_v2=0 ", "")),
    ("mlflow", edit(START, "--host 127.0.0.1", "--host 0.0.0.0")),
    ("mlflow", edit(START, "sqlite:///$HOME/", "sqlite:///")),
    ("mlflow", put("file_mounts ~/mlflow", "mlflow")),
    ("mlflow", edit(START, "systemctl --user stop fedlpp-mlflow", "true")),
    ("token", drop("file_mounts ~/.ray/auth_token")),
    ("token", edit(WORKER, "RAY_AUTH_MODE=token ", "")),
    ("versions", edit("setup_commands", "-c ~/fedlpp/constraints.txt ", "")),
    ("mounts", put("file_mounts", {"~/fedlpp": "."})),
    ("reports", edit(START, "--disable-usage-stats", "")),
    ("shell", put("setup_commands 0", "for i in 1 2; do echo")),
]


@pytest.fixture
def shipped() -> ClusterFile:
    return load(PATH)


@pytest.mark.parametrize("name", CHECKS)
def test_the_shipped_file_keeps_the_rule(name: str, shipped: ClusterFile) -> None:
    assert CHECKS[name](shipped) == []


@pytest.mark.parametrize(
    ("name", "mutate"), BREAKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BREAKS)]
)
def test_the_check_catches_a_broken_copy(name: str, mutate: Mutation, shipped: ClusterFile) -> None:
    broken = replace(shipped, config=json.loads(json.dumps(shipped.config)))
    mutate(broken.config)
    assert CHECKS[name](broken)


def test_every_check_has_a_copy_that_breaks_it() -> None:
    assert {name for name, _ in BREAKS} == set(CHECKS)


def test_the_header_explains_every_placeholder_and_command(shipped: ClusterFile) -> None:
    header = PATH.read_text().split("cluster_name:")[0]
    wanted = [*placeholders(shipped.config), "ray up -y", "ray dashboard", "ray job submit"]
    assert [w for w in [*wanted, "ray down -y", "COSTS"] if w not in header] == []
