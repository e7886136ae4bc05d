"""The nodes of the cluster as they come and go."""

from __future__ import annotations

import time
from typing import Any

import ray

_SECONDS = 1.0
_found: tuple[float, frozenset[str]] = (0.0, frozenset())


def draining() -> frozenset[str]:
    """Ids of the nodes that have notice to go, a second old at most.

    Those that are gone by now stay among them, so that it is known why they went.
    """
    global _found  # noqa: PLW0603
    now = time.monotonic()
    if now - _found[0] > _SECONDS:
        state: Any = ray._private.state.state
        _found = (now, _found[1] | frozenset(state.get_draining_nodes()))
    return _found[1]


def what_is_missing() -> str:
    """The nodes that are there and what is free on them, in words."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = {key: x for key, x in ray.available_resources().items() if key in ("CPU", "GPU")}
    words = ", ".join(f"{amount:g} {key}" for key, amount in sorted(free.items())) or "nothing"
    return f"the cluster has {len(nodes)} nodes, and {words} free"
