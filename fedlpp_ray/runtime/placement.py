"""What a run reserves: one bundle for the server, one for each client actor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError

Bundle = dict[str, float]
SERVER_BUNDLE = 0
"""Index of the server's bundle; client actor i has bundle i + 1."""
STRATEGY = "PACK"


class PlacementError(UserError):
    """The cluster cannot give what the run needs, or has not given it in time."""


def client_actors(experiment: Experiment) -> int:
    """Client actors of a run: as configured, but none that a cohort would leave idle."""
    return min(experiment.runtime.client_actors, experiment.federation.cohort_size)


def bundles(experiment: Experiment) -> list[Bundle]:
    """The reservation of a run: the server's bundle, then one for each client actor."""
    runtime = experiment.runtime
    server = _bundle(runtime.server_cpus, runtime.server_gpus)
    client = _bundle(runtime.client_cpus, runtime.client_gpus)
    return [server] + [client] * client_actors(experiment)


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def check_fits(needed: list[Bundle]) -> None:
    """Refuse at once what the connected cluster can never give.

    Counts the nodes that an autoscaler may still start.

    Raises:
        PlacementError: stating what is required and what is available.
    """
    limits, nodes = _limits()
    required: Bundle = {}
    for bundle in needed:
        if not any(_holds(node, bundle) for node in nodes):
            largest = {key: max(node.get(key, 0) for node in nodes) for key in bundle}
            raise PlacementError(
                f"one actor requires {_words(bundle)}; no node has that, the largest has "
                f"{_words(largest)}. {_ADVICE}"
            )
        for resource, amount in bundle.items():
            required[resource] = required.get(resource, 0) + amount
    for resource, amount in required.items():
        if amount > limits.get(resource, 0):
            raise PlacementError(
                f"the run requires {amount:g} {resource} (1 server and {len(needed) - 1} client "
                f"actors); the cluster has {limits.get(resource, 0):g}. {_ADVICE}"
            )


_ADVICE = (
    "Lower runtime.client_actors, client_cpus, client_gpus, server_cpus or server_gpus, "
    "or use a larger cluster"
)


def _holds(node: Bundle, bundle: Bundle) -> bool:
    return all(amount <= node.get(key, 0) for key, amount in bundle.items())


def _words(bundle: Bundle) -> str:
    return " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())


def _limits() -> tuple[Bundle, list[Bundle]]:
    """Most that the cluster can ever have in total, and its kinds of nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    # Ray keeps the autoscaler's limits here; its own data library asks them the same way.
    state: Any = ray._private.state.state
    if config := state.get_cluster_config():
        growth = state.get_max_resources_from_cluster_config() or {}
        total = {key: max(total.get(key, 0), growth.get(key, 0)) for key in {*total, *growth}}
        nodes += [dict(group.resources) for group in config.node_group_configs]
    return total, nodes


@contextmanager
def reserve(experiment: Experiment) -> Iterator[PlacementGroup]:
    """Reserve a run's bundles for the time of the block, for a run outside of Tune.

    Raises:
        PlacementError: the cluster can never give them, or has not in `runtime.start_timeout`.
    """
    needed = bundles(experiment)
    check_fits(needed)
    group = placement_group(needed, strategy=STRATEGY)
    try:
        if not group.wait(experiment.runtime.start_timeout):
            raise PlacementError(
                f"no room after {experiment.runtime.start_timeout:g} s "
                f"(runtime.start_timeout): required {needed}, free {ray.available_resources()}"
            )
        yield group
    finally:
        remove_placement_group(group)
