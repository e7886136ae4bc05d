"""What an autoscaler may still start.

Ray keeps the limits where `state.get_cluster_config` finds them only on some platforms; its own
autoscaler does not write them there. That it runs, it tells the GCS; what it may start is in the
file that `ray up` has put on the head, where the driver is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

LAUNCHED = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` puts the cluster's file on the head."""
UNKNOWN = {"CPU": 1024.0, "GPU": 16.0}
"""What a node may have where nobody says it, as with KubeRay: a run is not refused for it."""
MANY = 1000
ANSWER_SECONDS = 10


@dataclass(frozen=True)
class Growth:
    """What a cluster may grow to.

    Attributes:
        kinds: Resources of a kind of node, and how many of it there may be; existing ones count.
        most: Nodes of all kinds together.
    """

    kinds: tuple[tuple[dict[str, float], int], ...]
    most: int

    def total(self) -> dict[str, float]:
        """Most of each resource that all of these nodes together can have."""
        found = {}
        for key in {key for resources, _ in self.kinds for key in resources}:
            each = [kind.get(key, 0.0) for kind, count in self.kinds for _ in range(count)]
            found[key] = sum(sorted(each, reverse=True)[: self.most])
        return found


def growth() -> Growth | None:
    """What the connected cluster may grow to, or None where no autoscaler tells that it runs."""
    state: Any = ray._private.state.state
    if config := state.get_cluster_config():
        groups = [(dict(group.resources), group.max_count) for group in config.node_group_configs]
        kinds = tuple((resources, MANY if n < 0 else n) for resources, n in groups)
        return Growth(kinds, MANY)
    if not _autoscaler_runs():
        return None
    file = LAUNCHED.expanduser()
    if file.exists():
        return launched(yaml.safe_load(file.read_text(encoding="utf-8")))
    return Growth(((UNKNOWN, MANY),), MANY)


def launched(config: Mapping[str, Any]) -> Growth:
    """From the file of `ray up`, as the head has it; a kind without resources is unknown."""
    most = int(config.get("max_workers", MANY))
    head = config.get("head_node_type")
    kinds = [
        (
            {key: float(value) for key, value in (kind.get("resources") or UNKNOWN).items()},
            min(most, int(kind.get("max_workers", most))),
        )
        for name, kind in config["available_node_types"].items()
        if name != head or len(config["available_node_types"]) == 1
    ]
    return Growth(tuple(kind for kind in kinds if kind[1] > 0), most)


def _autoscaler_runs() -> bool:
    client: Any = ray._private.worker.global_worker.gcs_client
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_SECONDS))
    return bool(reply.HasField("autoscaling_state"))
