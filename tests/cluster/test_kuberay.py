"""`cluster/kuberay.yaml` is what it says it is, and each check of that can fail. Offline."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kuberay_checks import CHECKS, Documents, clusters, load

PATH = Path(__file__).parents[2] / "cluster" / "kuberay.yaml"
BY_NAME = {check.__name__.removeprefix("check_"): check for check in CHECKS}
Mutation = Callable[[Documents], None]
ABSENT = object()


def put(path: str, value: Any = ABSENT) -> Mutation:
    """Set the value at a path (keys and positions parted by ` / `), or take it out."""

    def mutate(documents: Documents) -> None:
        *parents, last = [int(k) if k.isdigit() else k for k in path.split(" / ")]
        node: Any = documents
        for key in parents:
            node = node[key]
        if value is ABSENT:
            del node[last]
        else:
            node[last] = value

    return mutate


CLUSTER, JOB = "RayCluster fedlpp-ray / spec", "RayJob fedlpp-ray-sweep / spec"
HEAD, WORKER = f"{CLUSTER} / headGroupSpec", f"{CLUSTER} / workerGroupSpecs / 0"
HEAD_POD, WORKER_POD = f"{HEAD} / template / spec", f"{WORKER} / template / spec"
POLICY = "NetworkPolicy fedlpp-ray / spec"
BREAKS: list[tuple[str, Mutation]] = [
    ("kinds", put("RayCluster fedlpp-ray / apiVersion", "ray.io/v1alpha1")),
    ("kinds", put("RayJob fedlpp-ray-sweep / metadata / labels", {})),
    ("fields", put(f"{CLUSTER} / authOption", {"mode": "token"})),
    ("fields", put(f"{JOB} / entryPoint", "true")),
    ("fields", put(f"{CLUSTER} / autoscalerOptions / idleTimeoutMinutes", 1)),
    ("fields", put(f"{HEAD} / rayStartParams / num-cpus", 0)),
    ("version", put(f"{CLUSTER} / rayVersion", "2.59.0")),
    ("version", put(f"{WORKER_POD} / containers / 0 / image", "rayproject/ray:latest")),
    ("token", put(f"{CLUSTER} / authOptions")),
    ("token", put(f"{JOB} / rayClusterSpec / authOptions / mode", "disabled")),
    ("head", put(f"{HEAD} / rayStartParams / num-cpus", "4")),
    ("head", put(f"{HEAD} / rayStartParams / dashboard-host", "0.0.0.0")),
    ("head", put(f"{HEAD} / serviceType", "LoadBalancer")),
    ("network", put("NetworkPolicy fedlpp-ray")),
    ("network", put(f"{POLICY} / ingress / 1 / ports")),
    ("network", put(f"{POLICY} / ingress / 1 / from")),
    ("network", put(f"{WORKER} / template / metadata / labels", {})),
    ("scaling", put(f"{CLUSTER} / enableInTreeAutoscaling", False)),
    ("scaling", put(f"{CLUSTER} / autoscalerOptions / idleTimeoutSeconds", 86400)),
    ("scaling", put(f"{WORKER} / minReplicas", 1)),
    ("scaling", put(f"{WORKER} / maxReplicas")),
    ("scaling", put(f"{JOB} / shutdownAfterJobFinishes", False)),
    ("scaling", put(f"{JOB} / activeDeadlineSeconds")),
    ("resources", put(f"{WORKER_POD} / containers / 0 / resources / limits / cpu", "8")),
    ("resources", put(f"{HEAD_POD} / containers / 0 / resources")),
    ("security", put(f"{WORKER_POD} / automountServiceAccountToken", True)),
    ("security", put(f"{WORKER_POD} / securityContext / runAsNonRoot", False)),
    ("security", put(f"{WORKER_POD} / serviceAccountName", "fedlpp-ray-head")),
    ("security", put(f"{WORKER_POD} / hostNetwork", True)),
    ("security", put(f"{HEAD_POD} / containers / 1 / securityContext", {"privileged": True})),
    ("mlflow", put(f"{HEAD_POD} / containers / 1")),
    ("mlflow", put(f"{HEAD_POD} / containers / 1 / command / 2", "--host=0.0.0.0")),
    ("mlflow", put(f"{HEAD_POD} / volumes", [{"name": "mlflow", "emptyDir": {}}])),
    ("notice", put(f"{WORKER_POD} / containers / 0 / lifecycle")),
    ("notice", put(f"{WORKER_POD} / terminationGracePeriodSeconds", 30)),
    ("same", put(f"{WORKER} / maxReplicas", 4)),
    ("secrets", put(f"{HEAD_POD} / containers / 0 / env", [{"name": "AWS_SECRET_ACCESS_KEY"}])),
]


@pytest.fixture
def shipped() -> Documents:
    return load(PATH)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_shipped_file_keeps_the_rule(name: str, shipped: Documents) -> None:
    assert BY_NAME[name](shipped) == []


@pytest.mark.parametrize(
    ("name", "mutate"), BREAKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BREAKS)]
)
def test_the_check_catches_a_broken_copy(name: str, mutate: Mutation, shipped: Documents) -> None:
    broken = copy.deepcopy(shipped)
    mutate(broken)
    assert BY_NAME[name](broken)


def test_every_check_has_a_copy_that_breaks_it() -> None:
    assert {name for name, _ in BREAKS} == set(BY_NAME)


def test_the_header_explains_every_placeholder_and_command() -> None:
    text = PATH.read_text()
    header = text.split("apiVersion:")[0]
    wanted = [*set(re.findall(r"REPLACE_[A-Z_]+", text)), "kubectl apply", "ray job submit"]
    assert [w for w in [*wanted, "kubectl delete", "COSTS MONEY"] if w not in header] == []


def test_the_image_holds_all_that_the_entrypoint_runs() -> None:
    root = PATH.parents[1]
    copied = re.findall(
        r"^COPY --chown=ray (.+) \S+$", (root / "cluster/Dockerfile").read_text(), re.M
    )
    files = {name for line in copied for name in line.split()}
    assert all((root / name).exists() for name in files)
    assert {"fedlpp_ray", "search_spaces", "configs", "constraints.txt"} <= files
    assert set(clusters(load(PATH))) == {"RayCluster", "RayJob"}
