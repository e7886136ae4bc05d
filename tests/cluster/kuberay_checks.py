"""What `cluster/kuberay.yaml` must hold, one small function per rule.

There is no Kubernetes here to ask, so the fields of KubeRay's API (reference of ray.io/v1, operator
1.6) that the file may use are listed. Each check returns the problems it finds as sentences.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
Documents = dict[str, Any]
"""`kind name` to the document; two of the same kind and name would be one to Kubernetes."""
VERSION = re.search(
    r"^ray==(\S+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.MULTILINE
)
API = {
    "ServiceAccount": "v1",
    "PersistentVolumeClaim": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
}
CLUSTER_FIELDS = (
    "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec "
    "workerGroupSpecs gcsFaultToleranceOptions headServiceAnnotations suspend managedBy"
)
JOB_FIELDS = (
    "entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished "
    "activeDeadlineSeconds rayClusterSpec runtimeEnvYAML jobId metadata clusterSelector "
    "submitterPodTemplate submitterConfig deletionStrategy suspend managedBy entrypointNumCpus"
)
AUTOSCALER_FIELDS = (
    "version idleTimeoutSeconds upscalingMode securityContext resources image imagePullPolicy env "
    "envFrom volumeMounts"
)
HEAD_FIELDS = "serviceType rayStartParams template headService enableIngress resources labels"
WORKER_FIELDS = (
    "groupName replicas minReplicas maxReplicas rayStartParams template idleTimeoutSeconds "
    "numOfHosts scaleStrategy suspend resources labels"
)


def load(path: Path) -> Documents:
    """Every document of a file, by kind and name."""
    documents = list(yaml.safe_load_all(path.read_text()))
    found = {f"{d['kind']} {d['metadata']['name']}": d for d in documents}
    assert len(found) == len(documents), "two documents have one kind and name"
    return found


def clusters(documents: Documents) -> dict[str, Document]:
    """The spec of each Ray cluster: of the RayCluster, and of the RayJob."""
    job = documents["RayJob fedlpp-ray-sweep"]["spec"]
    return {
        "RayCluster": documents["RayCluster fedlpp-ray"]["spec"],
        "RayJob": job["rayClusterSpec"],
    }


def groups(documents: Documents) -> Iterator[tuple[str, Document]]:
    """Every group of pods of every cluster, with a name for messages."""
    for name, spec in clusters(documents).items():
        yield f"{name} head", spec["headGroupSpec"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group


def containers(documents: Documents) -> Iterator[tuple[str, Document]]:
    """Every container, with a name for messages."""
    for name, group in groups(documents):
        for container in group["template"]["spec"]["containers"]:
            yield f"{name} {container['name']}", container


def check_kinds(documents: Documents) -> list[str]:
    """Each kind has its API version, and a label that chooses it."""
    problems = []
    for name, document in documents.items():
        if document["apiVersion"] != API.get(document["kind"]):
            problems.append(f"{name}: not of an API that it exists in")
        if document["metadata"].get("labels", {}).get("part") not in ("base", "cluster", "job"):
            problems.append(f"{name}: `kubectl apply -l part=...` does not find it")
    return problems


def check_fields(documents: Documents) -> list[str]:
    """KubeRay's part of the file has fields that KubeRay knows."""
    job = documents["RayJob fedlpp-ray-sweep"]["spec"]
    parts = [("RayJob", job, JOB_FIELDS)]
    for name, spec in clusters(documents).items():
        parts.append((name, spec, CLUSTER_FIELDS))
        parts.append((f"{name} autoscaler", spec["autoscalerOptions"], AUTOSCALER_FIELDS))
        parts.append((f"{name} head", spec["headGroupSpec"], HEAD_FIELDS))
        parts += [(f"{name} worker", group, WORKER_FIELDS) for group in spec["workerGroupSpecs"]]
    problems = [
        f"{name}: {field} is unknown"
        for name, part, known in parts
        for field in part.keys() - set(known.split())
    ]
    for name, group in groups(documents):
        for key, value in group["rayStartParams"].items():
            if not isinstance(value, str):
                problems.append(f"{name}: {key} must be a string")
    return problems


def check_version(documents: Documents) -> list[str]:
    """Every cluster states the Ray of constraints.txt, and so does the image they run."""
    wanted = VERSION[1] if VERSION else "a pinned Ray"
    dockerfile = (Path(__file__).parents[2] / "cluster" / "Dockerfile").read_text()
    problems = [
        f"{name}: not Ray {wanted}"
        for name, spec in clusters(documents).items()
        if spec.get("rayVersion") != wanted
    ]
    if not re.search(rf"^FROM rayproject/ray:{re.escape(wanted)}-py312-gpu$", dockerfile, re.M):
        problems.append(f"the image is not made from that of Ray {wanted}")
    images = {container.get("image") for _, container in containers(documents)}
    return problems if images == {"REPLACE_IMAGE"} else [*problems, f"images {images}"]


def check_token(documents: Documents) -> list[str]:
    """Every cluster asks for a token."""
    return [
        f"{name}: no token authentication"
        for name, spec in clusters(documents).items()
        if spec.get("authOptions") != {"mode": "token"}
    ]


def check_head(documents: Documents) -> list[str]:
    """No trial on the head; nothing of it reachable from outside of the Kubernetes cluster."""
    problems = []
    for name, spec in clusters(documents).items():
        head = spec["headGroupSpec"]
        if head["rayStartParams"].get("num-cpus") != "0":
            problems.append(f"{name}: trials may be placed on the head")
        if head.get("serviceType") != "ClusterIP":
            problems.append(f"{name}: the head's service is open to the world")
        if head["template"]["spec"].get("restartPolicy") != "Never":
            problems.append(f"{name}: a head that restarts is another head")
    loopback = clusters(documents)["RayCluster"]["headGroupSpec"]["rayStartParams"]
    if loopback.get("dashboard-host") != "127.0.0.1":
        problems.append("RayCluster: the dashboard is not bound to loopback")
    return problems


def check_network(documents: Documents) -> list[str]:
    """A policy closes every pod but to its own, the operator and the submitter."""
    policy = documents.get("NetworkPolicy fedlpp-ray", {}).get("spec", {})
    labels = policy.get("podSelector", {}).get("matchLabels")
    if not labels or "Ingress" not in policy.get("policyTypes", []):
        return ["no NetworkPolicy guards Ray's ports"]
    problems = [
        f"{name}: the policy does not select it"
        for name, group in groups(documents)
        if not labels.items() <= group["template"]["metadata"]["labels"].items()
    ]
    inside, *others = policy.get("ingress", [{}])
    if inside != {"from": [{"podSelector": {"matchLabels": labels}}]}:
        problems.append("the pods do not reach each other")
    for rule in others:
        if not rule.get("from") or [p["port"] for p in rule.get("ports", [])] != [8265]:
            problems.append("others reach more than the dashboard's port")
    return problems


def check_scaling(documents: Documents) -> list[str]:
    """Workers come and go with the work; a finished RayJob leaves no cluster."""
    problems = []
    for name, spec in clusters(documents).items():
        options = spec.get("autoscalerOptions", {})
        if not spec.get("enableInTreeAutoscaling") or options.get("version") != "v2":
            problems.append(f"{name}: no autoscaler v2")
        if not 0 < options.get("idleTimeoutSeconds", 0) <= 3600:
            problems.append(f"{name}: idle workers live for more than an hour")
        for group in spec["workerGroupSpecs"]:
            if group.get("minReplicas") != 0 or group.get("replicas") != 0:
                problems.append(f"{name}: workers cost money while nothing runs")
            if not 0 < group.get("maxReplicas", 0) <= 8:
                problems.append(f"{name}: no limit of workers")
    job = documents["RayJob fedlpp-ray-sweep"]["spec"]
    if not job.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" not in job:
        problems.append("RayJob: its cluster outlives the sweep")
    if not 0 < job.get("activeDeadlineSeconds", 0) <= 7 * 86400:
        problems.append("RayJob: what hangs costs for ever")
    return problems


def check_resources(documents: Documents) -> list[str]:
    """Requests are limits, so that Ray counts what a pod really has; workers have a GPU."""
    problems = []
    for name, container in containers(documents):
        requests = container.get("resources", {}).get("requests", {})
        limits = container.get("resources", {}).get("limits", {})
        if not {"cpu", "memory"} <= requests.keys() & limits.keys():
            problems.append(f"{name}: cpu or memory is not stated")
        elif container["name"] != "mlflow" and requests != limits:
            problems.append(f"{name}: requests and limits differ")
        if container["name"] == "ray-worker" and "nvidia.com/gpu" not in limits:
            problems.append(f"{name}: no GPU")
    return problems


def check_security(documents: Documents) -> list[str]:
    """No root, no capability, no rights beyond the accounts' own."""
    problems = []
    wanted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for name, container in containers(documents):
        if container.get("securityContext") != wanted:
            problems.append(f"{name}: more rights than it needs")
    accounts = {"head": "fedlpp-ray-head", "gpu": "fedlpp-ray-worker"}
    for name, group in groups(documents):
        pod = group["template"]["spec"]
        context = pod.get("securityContext", {})
        seccomp = context.get("seccompProfile", {}).get("type")
        if not context.get("runAsNonRoot") or seccomp != "RuntimeDefault":
            problems.append(f"{name}: may run as root, or without seccomp")
        if pod.get("serviceAccountName") != accounts[name.split()[1]]:
            problems.append(f"{name}: not its own account")
        if "gpu" in name and pod.get("automountServiceAccountToken") is not False:
            problems.append(f"{name}: clients hold a key to Kubernetes")
        if any(key in pod for key in ("hostNetwork", "hostPID", "hostIPC")):
            problems.append(f"{name}: shares the host's namespaces")
    return problems


def check_mlflow(documents: Documents) -> list[str]:
    """MLflow is on the head pod's loopback, its database alone on a volume, artifacts on S3."""
    problems = []
    for name, spec in clusters(documents).items():
        pod = spec["headGroupSpec"]["template"]["spec"]
        ray, *others = pod["containers"]
        server = next((c for c in others if c["command"][:2] == ["mlflow", "server"]), None)
        if server is None:
            problems.append(f"{name}: MLflow is not started on the head, after Ray's container")
            continue
        command = " ".join(server["command"])
        for part in ("--host=127.0.0.1", "sqlite:////mlflow/", "--artifacts-destination=s3://"):
            if part not in command:
                problems.append(f"{name}: mlflow server: no {part}")
        if "volumeMounts" in ray or not server.get("volumeMounts"):
            problems.append(f"{name}: the volume is not MLflow's alone")
        claims = [v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]]
        if claims != ["fedlpp-mlflow"]:
            problems.append(f"{name}: the database dies with the pod")
    return problems


def check_notice(documents: Documents) -> list[str]:
    """A worker pod that is ended tells Ray, and has time to."""
    problems = []
    for name, group in groups(documents):
        if name.endswith("head"):
            continue
        pod = group["template"]["spec"]
        hook = str(pod["containers"][0].get("lifecycle", {}).get("preStop", ""))
        if "ray drain-node" not in hook or "DRAIN_NODE_REASON_PREEMPTION" not in hook:
            problems.append(f"{name}: nobody hears of a preemption")
        elif not int(re.findall(r"sleep (\d+)", hook)[0]) < pod["terminationGracePeriodSeconds"]:
            problems.append(f"{name}: killed before its preStop ends")
    return problems


def check_same(documents: Documents) -> list[str]:
    """The RayJob's cluster is the RayCluster, but for who may ask its dashboard."""
    specs = clusters(documents)
    one, other = (yaml.safe_dump(spec) for spec in specs.values())
    one = one.replace("dashboard-host: 127.0.0.1", "dashboard-host: 0.0.0.0")
    return [] if one == other else ["the specs of RayCluster and RayJob have drifted apart"]


def check_secrets(documents: Documents) -> list[str]:
    """No secret stands in the file."""
    text = yaml.safe_dump_all(documents.values()).lower()
    names = ("password", "secret_access_key", "aws_access_key", "auth_token:", "hf_token")
    return [f"{name} in the file" for name in names if name in text]


CHECKS: tuple[Callable[[Documents], list[str]], ...] = (
    check_kinds,
    check_fields,
    check_version,
    check_token,
    check_head,
    check_network,
    check_scaling,
    check_resources,
    check_security,
    check_mlflow,
    check_notice,
    check_same,
    check_secrets,
)
