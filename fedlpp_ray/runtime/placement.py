"""What a run reserves: a bundle for each rank of the server, then for each of the client actors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.runtime.growth import growth
from fedlpp_ray.runtime.watch import what_is_missing

Bundle = dict[str, float]
STRATEGY = "PACK"


class PlacementError(UserError):
    """The cluster cannot give what the run needs, or has not given it in time."""


def client_actors(experiment: Experiment) -> int:
    """Client actors of a run: as configured, but none that a cohort would leave idle."""
    return min(experiment.runtime.client_actors, experiment.federation.cohort_size)


def actors_of(experiment: Experiment) -> tuple[Any, ...]:
    """What two runs must have in common if the second is to use the actors of the first."""
    spread = [(x.num_workers, x.zero) for x in (experiment.server, experiment.client)]
    return experiment.method, experiment.runtime, client_actors(experiment), spread


def bundles(experiment: Experiment) -> list[Bundle]:
    """The reservation of a run: bundles of the server's ranks, then of each client actor's.

    With `runtime.min_client_actors` it has so many of these, and the other actors join when there
    is room. A run that is no federation has the server's alone.
    """
    runtime = experiment.runtime
    server = [_bundle(runtime.server_cpus, runtime.server_gpus)] * experiment.server.num_workers
    if experiment.method != "federated":
        return server
    most = client_actors(experiment)
    reserved = min(most, runtime.min_client_actors or most)
    return server + [client_bundle(experiment)] * experiment.client.num_workers * reserved


def server_indices(experiment: Experiment) -> range:
    """Of the bundles of the server's ranks."""
    return range(experiment.server.num_workers)


def client_indices(experiment: Experiment, number: int) -> range:
    """Of the bundles of a client actor's ranks; empty if none is reserved for it."""
    size = experiment.client.num_workers
    first = experiment.server.num_workers + number * size
    return range(first, first + size) if first < len(bundles(experiment)) else range(0)


def client_bundle(experiment: Experiment) -> Bundle:
    """What one rank of a client actor takes."""
    return _bundle(experiment.runtime.client_cpus, experiment.runtime.client_gpus)


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def check_fits(needed: list[Bundle], ranks: int = 1) -> None:
    """Refuse at once what the connected cluster can never give.

    Counts the nodes that an autoscaler may still start.

    Args:
        needed: As `bundles` returns them.
        ranks: So many of them, the first, are of the server.

    Raises:
        PlacementError: stating what is required and what is available.
    """
    most, nodes = limits(len(needed))
    required: Bundle = {}
    for bundle in needed:
        if not any(_holds(node, bundle) for node in nodes):
            largest = {key: max(node.get(key, 0) for node in nodes) for key in bundle}
            raise PlacementError(
                f"one actor requires {in_words(bundle)}; no node has that, the largest has "
                f"{in_words(largest)}. {_ADVICE}"
            )
    for resource in dict.fromkeys(key for bundle in needed for key in bundle):
        units = sum(_units(bundle.get(resource, 0)) for bundle in needed)
        required[resource] = units / _UNITS
    server, clients = needed[0], needed[ranks:]
    for resource, amount in required.items():
        if amount > most.get(resource, 0):
            raise PlacementError(
                f"the run requires {amount:g} {resource} (server: {ranks}, client "
                f"actors: {len(clients)}); the cluster has {most.get(resource, 0):g}. "
                f"{_ADVICE}"
            )
    room = _room(nodes, server, ranks, clients[0] if clients else server)
    if room < 0:
        raise PlacementError(
            f"the server requires {ranks} times {in_words(server)}; the cluster's nodes and GPUs "
            f"have no room for that. {_ADVICE}"
        )
    if room < len(clients):
        raise PlacementError(
            f"the run requires {len(clients)} client actors with {in_words(clients[0])} each; "
            f"beside the server the cluster's nodes and GPUs have room for {room} (an "
            "actor takes all of its bundle from one node, and a share of a GPU from one GPU). "
            f"{_ADVICE}"
        )


_ADVICE = (
    "Lower runtime.client_actors, client_cpus, client_gpus, server_cpus or server_gpus, "
    "or server.num_workers or client.num_workers, or use a larger cluster"
)


_UNITS = 10_000
"""Ray counts resources in so many parts of one."""


def _holds(node: Bundle, bundle: Bundle) -> bool:
    return all(amount <= node.get(key, 0) for key, amount in bundle.items())


def _room(nodes: list[Bundle], server: Bundle, ranks: int, client: Bundle) -> int:
    """Client bundles for which there is room beside the server's, wherever these are; or -1."""
    most = [0] + [-1] * ranks  # by the number of the server's bundles that have a place
    for node in nodes:
        beside = [_room_on(node, [server] * count, client) for count in range(ranks + 1)]
        most = [
            max(
                (most[i - j] + beside[j] for j in range(i + 1) if min(most[i - j], beside[j]) >= 0),
                default=-1,
            )
            for i in range(ranks + 1)
        ]
    return most[ranks]


def _room_on(node: Bundle, servers: list[Bundle], client: Bundle) -> int:
    """Client bundles on one node beside some of the server's, or -1; a share comes of one GPU."""
    cpus = _units(node.get("CPU", 0)) - sum(_units(each.get("CPU", 0)) for each in servers)
    gpus = [_units(1)] * int(node.get("GPU", 0))
    for used in filter(None, (_units(each.get("GPU", 0)) for each in servers)):
        fitting = [number for number, free in enumerate(gpus) if free >= used]
        if not fitting:
            return -1
        gpus[min(fitting, key=gpus.__getitem__)] -= used
    if cpus < 0:
        return -1
    by_cpu, share = cpus // _units(client["CPU"]), _units(client.get("GPU", 0))
    return min(by_cpu, sum(gpu // share for gpu in gpus)) if share else by_cpu


def _units(amount: float) -> int:
    return round(amount * _UNITS)


def in_words(bundle: Bundle) -> str:
    """`0.5 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())


def limits(wanted: int) -> tuple[Bundle, list[Bundle]]:
    """Most that the cluster can ever have in total, and the nodes that it has or may start.

    Of a kind of node that may be started, no more are listed than `wanted`.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    if more := growth():
        most = more.total()
        total = {key: max(total.get(key, 0), most.get(key, 0)) for key in {*total, *most}}
        for resources, count in more.kinds:
            nodes += [resources] * min(count, wanted)
    return total, nodes


def is_whole(group: PlacementGroup) -> bool:
    """Whether every bundle has its place; one that is lost with its node is to get another."""
    return bool(placement_group_table(group)["state"] == "CREATED")


@contextmanager
def reserve(experiment: Experiment) -> Iterator[PlacementGroup]:
    """Reserve a run's bundles for the time of the block, for a run outside of Tune.

    Raises:
        PlacementError: the cluster can never give them, or has not in `runtime.start_timeout`.
    """
    needed = bundles(experiment)
    check_fits(needed, experiment.server.num_workers)
    group = placement_group(needed, strategy=STRATEGY)
    try:
        if not group.wait(experiment.runtime.start_timeout):
            required = ", ".join(map(in_words, needed))
            raise PlacementError(
                f"no room after {experiment.runtime.start_timeout:g} s "
                f"(runtime.start_timeout): required {required}; {what_is_missing()}"
            )
        yield group
    finally:
        remove_placement_group(group)
