"""What `cluster/gcp.yaml` must hold: the rules of `cluster_file`, and those of Google Cloud."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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

# Keys of an instance (REST reference, compute v1, instances.insert) that this file may use ...
INSTANCE_KEYS = {
    "machineType": "",
    "disks": "[]",
    "networkInterfaces": "[]",
    "tags": "items",
    "labels": "*",
    "metadata": "items",
    "serviceAccounts": "[]",
    "scheduling": "provisioningModel instanceTerminationAction onHostMaintenance automaticRestart",
}
# ... and the values of those that are enumerated there.
SCHEDULING = {
    "provisioningModel": {"STANDARD", "SPOT"},
    "instanceTerminationAction": {"DELETE", "STOP"},
    "onHostMaintenance": {"MIGRATE", "TERMINATE"},
}


def is_spot(kind: Config) -> bool:
    """Whether a node type asks for spot instances."""
    return bool(kind["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT")


def check_node_config(file: ClusterFile) -> list[str]:
    """Every key is one that this file knows, every enumerated value one of Compute Engine's."""
    problems = []
    for name, kind in file.node_types.items():
        node = kind["node_config"]
        problems += [f"{name}: {key} is unknown" for key in node.keys() - INSTANCE_KEYS.keys()]
        for key, allowed in INSTANCE_KEYS.items():
            if isinstance(node.get(key), dict) and allowed not in ("", "*", "[]"):
                unknown = node[key].keys() - set(allowed.split())
                problems += [f"{name}: {key}.{part} is unknown" for part in unknown]
        for key, values in SCHEDULING.items():
            if node.get("scheduling", {}).get(key, next(iter(values))) not in values:
                problems.append(f"{name}: scheduling.{key} is not one of {sorted(values)}")
    return problems


def check_discovery(file: ClusterFile) -> list[str]:
    """The same against Google's own description of an instance, where its client is installed."""
    return [
        f"{name}: {problem}"
        for name, kind in file.node_types.items()
        for problem in unlike(kind["node_config"])
    ]


def unlike(instance: Config) -> list[str]:
    """Where an instance differs from Google's description; empty without Google's client, too."""
    if (spec := find_spec("googleapiclient")) is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "discovery_cache" / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text())["schemas"]
    return list(_unlike(instance, {"$ref": "Instance"}, schemas, "instance"))


def _unlike(value: Any, schema: Config, schemas: Config, where: str) -> Iterator[str]:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if isinstance(value, dict):
        fields, extra = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            if key in fields or extra:
                yield from _unlike(item, fields.get(key, extra), schemas, f"{where}.{key}")
            else:
                yield f"{where}.{key} is not a field"
    elif isinstance(value, list):
        if schema.get("type") != "array":
            yield f"{where} is not a list"
            return
        for item in value:
            yield from _unlike(item, schema["items"], schemas, f"{where}[]")
    elif schema.get("type") in ("object", "array"):
        yield f"{where} is not one value"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"


def check_network(file: ClusterFile) -> list[str]:
    """Nothing listens on the world; every node has the tag that the firewall rules name."""
    problems = [f"{w}: {t}" for w, t in strings(file.config) if "0.0.0.0" in t or "::/0" in t]
    if "--dashboard-host=127.0.0.1" not in ray_start(file, "head_start_ray_commands"):
        problems.append("the dashboard is not bound to loopback")
    for name, kind in file.node_types.items():
        node = kind["node_config"]
        if node.get("tags", {}).get("items") != ["fedlpp-ray"]:
            problems.append(f"{name}: not under the firewall rules of this cluster")
        if not node.get("networkInterfaces"):
            problems.append(f"{name}: Ray takes the first subnetwork it finds")
    return problems


def check_disks(file: ClusterFile) -> list[str]:
    """Every node names its image, and its disk goes with it."""
    problems = []
    for name, kind in file.node_types.items():
        disks = kind["node_config"].get("disks", [])
        boot = [disk for disk in disks if disk.get("boot")]
        if len(boot) != 1 or not all(disk.get("autoDelete") is True for disk in disks):
            problems.append(f"{name}: not one boot disk, or a disk that outlives its node")
        image = boot[0].get("initializeParams", {}).get("sourceImage", "") if boot else ""
        if not re.fullmatch(r"projects/[\w-]+/global/images/(family/)?[\w-]+", image):
            problems.append(f"{name}: no image")
    return problems


def check_market(file: ClusterFile) -> list[str]:
    """Workers are spot first, with an on-demand fallback that differs in nothing else."""
    problems = check_spot_first(file, is_spot)
    spot = {k: v for k, v in file.workers.items() if is_spot(v)}
    if len({v["node_config"]["machineType"] for v in file.workers.values()}) != 1:
        problems.append("spot and fallback differ in size, so priority does not decide")
    for name, kind in spot.items():
        if kind["node_config"]["scheduling"].get("instanceTerminationAction") != "DELETE":
            problems.append(f"{name}: a preempted node keeps its disk, which costs money")
    for name, kind in file.workers.items():
        if not kind["resources"].get("GPU"):
            problems.append(f"{name}: Ray looks up no resources here, and none are stated")
    return problems


def check_accounts(file: ClusterFile) -> list[str]:
    """Workers have an account of their own; the head's is Ray's."""
    problems = []
    for name, kind in file.workers.items():
        accounts = kind["node_config"].get("serviceAccounts", [])
        if [a.get("email") for a in accounts] != ["REPLACE_WORKER_ACCOUNT"]:
            problems.append(f"{name}: not the workers' account")
    if "serviceAccounts" in file.head["node_config"]:
        problems.append("the head's account is overwritten by Ray")
    return problems


def check_key(file: ClusterFile) -> list[str]:
    """The cluster has a key of its own, and takes no other of the project."""
    problems = [] if file.config["auth"].get("ssh_private_key") else ["Ray adds a project-wide key"]
    for name, kind in file.node_types.items():
        items = kind["node_config"].get("metadata", {}).get("items", [])
        found = {item["key"]: item["value"] for item in items}
        if found.get("block-project-ssh-keys") != "TRUE" or "ssh-keys" not in found:
            problems.append(f"{name}: not this cluster's key alone")
    return problems


def check_termination(file: ClusterFile) -> list[str]:
    """Idle nodes are deleted rather than stopped, and the one zone is in the region."""
    provider, problems = file.config["provider"], []
    if provider.get("cache_stopped_nodes") is not False:
        problems.append("stopped nodes keep their disks, which cost money")
    if not 0 < file.config.get("idle_timeout_minutes", 0) <= 60:
        problems.append("idle nodes live for more than an hour")
    if not re.fullmatch(re.escape(provider["region"]) + "-[a-z]", provider["availability_zone"]):
        problems.append("the zone is not one zone of the region")
    return problems


CHECKS: tuple[Callable[[ClusterFile], list[str]], ...] = (
    check_schema,
    check_no_defaults,
    check_worker_limits,
    check_node_config,
    check_discovery,
    check_network,
    check_disks,
    check_market,
    check_head,
    check_accounts,
    check_key,
    check_token,
    check_termination,
    check_versions,
    check_mounts,
    check_mlflow,
    check_watcher,
    check_reports,
    check_shell,
)
