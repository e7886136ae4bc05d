"""A run in a process of its own: `python -m tests.runtime.soak VALUES`, with dotted keys as JSON.

Prints what it came to as JSON: the history, samples of its use of memory every 50 rounds, and what
is left of it at the end.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group_table

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.runtime import RayBackend, connect, reserve
from tests.federation.test_loop import numbers

EVERY = 50


def main(values: dict[str, object]) -> dict[str, Any]:
    """Run it."""
    experiment = Experiment().with_values(values)
    with connect():
        with reserve(experiment) as group, closing(RayBackend(experiment, group)) as backend:
            federation = Federation(experiment, backend)
            samples = [
                sample(backend)
                for record in finished_rounds(federation)
                if record.round % EVERY == 0
            ]
        left = wait_for_end()
        pids = {process.pid for process in psutil.Process().children(recursive=True)}
    gone = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], 30)
    processes = [" ".join(process.cmdline()) for process in gone[1]]
    return {"history": numbers(federation.history), "samples": samples, "left": left + processes}


def sample(backend: RayBackend) -> dict[str, float]:
    """MB of each party and of the object store; counts of what the driver waits for and holds."""
    gc.collect()
    actors = {"server": backend.server.actor}
    actors |= {f"client {slot.number}": slot.actor for slot in backend.pool.working}
    asked = [actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors.values()]
    pids = dict(zip(actors, ray.get(asked), strict=True)) | {"driver": os.getpid()}
    (raylet,) = (each for each in psutil.Process().children() if each.name() == "raylet")
    return {name: memory(pid) for name, pid in pids.items()} | {
        "store": raylet.memory_info().shared / 1e6,
        "waited for": len(backend._reactor._then),
        "references": len(ray._private.worker.global_worker.core_worker.get_all_reference_counts()),
    }


def memory(pid: int) -> float:
    """MB that are a process's own."""
    return float(psutil.Process(pid).memory_full_info().uss) / 1e6


def wait_for_end() -> list[str]:
    """Actors and reservations that are left, when they have had time to go."""
    for _ in range(100):
        states = [f"actor {a['State']}" for a in ray._private.state.actors().values()]
        states += [f"reservation {g['state']}" for g in placement_group_table().values()]
        left = alive(states)
        if not left:
            break
        time.sleep(0.2)
    return left


def alive(states: Iterable[str]) -> list[str]:
    """Those that have not ended."""
    return [state for state in states if not state.endswith(("DEAD", "REMOVED"))]


if __name__ == "__main__":
    logging.basicConfig()
    print(json.dumps(main(json.loads(sys.argv[1]))))
