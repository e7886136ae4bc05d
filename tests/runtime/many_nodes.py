"""A cluster of several nodes on this machine, whose nodes can be added, killed and drained."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.utils import get_ray_address_file
from ray._raylet import AuthenticationTokenLoader, Config
from ray.cluster_utils import Cluster

from fedlpp_ray.config import Experiment
from fedlpp_ray.runtime import placement, watch
from fedlpp_ray.runtime.placement import Bundle, bundles

CLIENT_CPUS, SERVER_CPUS = 2, 1
"""What a node has: a client does not fit in the place of a server."""
SERVER = "server"
"""A resource of the nodes that the server may be placed on."""


class Nodes:
    """Nodes for the server and nodes for one client actor each; the head is neither."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self._cpus: dict[str, int] = {}

    def add(self, cpus: int) -> str:
        """Start a node; returns its id."""
        resources = {SERVER: 1} if cpus == SERVER_CPUS else {}
        node = str(self._cluster.add_node(num_cpus=cpus, resources=resources).node_id)
        self._cpus[node] = cpus
        return node

    def kill(self, node: str) -> None:
        """End all processes of a node at once."""
        (found,) = (each for each in self._cluster.worker_nodes if each.node_id == node)
        raylet = psutil.Process(found.all_processes["raylet"][0].process.pid)
        workers = raylet.children(recursive=True)
        for process in workers:  # which would go on for a moment after their raylet
            process.kill()
        self._cluster.remove_node(found, allow_graceful=False)
        del self._cpus[node]

    def there(self, cpus: int) -> list[str]:
        """The nodes of a kind."""
        return [node for node, has in self._cpus.items() if has == cpus]

    def want(self, clients: int, servers: int) -> None:
        """Have so many nodes of each kind."""
        for cpus, count in ((CLIENT_CPUS, clients), (SERVER_CPUS, servers)):
            for _ in range(count - len(self.there(cpus))):
                self.add(cpus)
            for node in self.there(cpus)[count:]:
                self.kill(node)
        self.settle()

    def settle(self, seconds: float = 120.0) -> None:
        """Wait until the cluster knows of each node that is there, and of each that is not."""
        there = {self._cluster.head_node.node_id, *self._cpus}
        deadline = time.monotonic() + seconds
        while {node["NodeID"] for node in ray.nodes() if node["Alive"]} != there:
            assert time.monotonic() < deadline, "the cluster has not noticed a node"
            time.sleep(0.1)

    def drain(self, node: str, seconds: int) -> None:
        """Give a node notice that it will be preempted."""
        words = f"drain-node --address {self.address} --node-id {node} --reason-message spot"
        words += f" --reason DRAIN_NODE_REASON_PREEMPTION --deadline-remaining-seconds {seconds}"
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words.split()], check=True)
        watch._found = (0.0, frozenset())  # what is a second old would do for a second


@contextmanager
def many_nodes() -> Iterator[Nodes]:
    """A head without CPUs, to which RAY_ADDRESS points for the time of the block."""
    file = Path(get_ray_address_file(None))
    before = file.read_text() if file.exists() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_health_check_period_ms", "1000")  # five in vain, and a node is lost
        patch.setattr(placement, "bundles", _bundles)
        _read_environment()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        patch.setenv("RAY_ADDRESS", cluster.address)
        try:
            yield Nodes(cluster)
        finally:
            cluster.shutdown()
            if before is None:
                file.unlink(missing_ok=True)
            else:
                file.write_text(before)
    _read_environment()


def _bundles(experiment: Experiment) -> list[Bundle]:
    """With the server's pinned to a node of its own."""
    server, *clients = bundles(experiment)
    return [server | {SERVER: 1.0}, *clients]


def _read_environment() -> None:
    """Ray reads its own variables once in a process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def around(
    patch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    *,
    before: Callable[..., None] = lambda *_: None,
    after: Callable[..., None] = lambda *_: None,
) -> None:
    """Have functions called, with the number of the call and its arguments, around a method."""
    original, calls = getattr(owner, method), [0]

    def wrapped(*arguments: Any) -> Any:
        calls[0] += 1
        number = calls[0]
        before(number, *arguments)
        result = original(*arguments)
        after(number, *arguments)
        return result

    patch.setattr(owner, method, wrapped)
