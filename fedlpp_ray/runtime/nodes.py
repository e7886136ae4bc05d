"""The nodes of a cluster, as far as a plan needs to know them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fedlpp_ray.config import Experiment
from fedlpp_ray.runtime.placement import bundles, limits

GIB = 1 << 30
CARDS = {
    "T4": 16,
    "V100": 16,
    "L4": 24,
    "A10G": 24,
    "A100-40G": 40,
    "L40S": 48,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
}
"""GiB of a GPU by the type that Ray gives it. It calls both kinds of A100 "A100"."""


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has.

    Attributes:
        cpus: CPUs that Ray counts there.
        memory: Bytes that were free when Ray started, or None if unknown.
        gpus: Number of its GPUs.
        card: Bytes of each GPU, or None if unknown.
    """

    cpus: float
    memory: int | None = None
    gpus: int = 0
    card: int | None = None


def node_of(resources: Mapping[str, float], local_card: int | None = None) -> Node:
    """A node from the resources that Ray states.

    Args:
        resources: As in `ray.nodes()`.
        local_card: Bytes of a GPU of this machine, for a cluster that is this machine alone.
    """
    kinds = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
    cards = [CARDS[kind] * GIB for kind in kinds if kind in CARDS]
    memory = resources.get("memory", 0) + resources.get("object_store_memory", 0)
    return Node(
        cpus=resources.get("CPU", 0),
        memory=int(memory) or None,
        gpus=int(resources.get("GPU", 0)),
        card=local_card or (min(cards) if cards else None),
    )


def cluster_nodes(experiment: Experiment) -> list[Node]:
    """The nodes of the connected cluster, and those that it may start for this experiment."""
    _, nodes = limits(len(bundles(experiment)))
    return [node_of(resources, _local_card()) for resources in nodes]


def _local_card() -> int | None:
    """Bytes of this machine's GPU, where the cluster is this machine alone."""
    if "RAY_ADDRESS" in os.environ:
        return None
    import torch  # only here: a cluster's submitting machine need not have it loaded yet

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
