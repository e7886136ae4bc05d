"""Where the seconds of a round go, and what each process holds, for the default experiment in Ray.

    python -m benchmarks.federation

The default experiment runs its usual rounds, each evaluated. A round's wall time is split in client
compute (that of the busiest actor) and overhead (what it and the evaluation at an actor leave of
the round: object store, scheduling, waiting for the server). A round is evaluated while the next
one trains. Start-up is from the reservation to the first round. Read the shares.
"""

from __future__ import annotations

import resource
import time
from contextlib import closing
from statistics import median
from typing import Any

import ray

from fedlpp_ray.config import Experiment, load_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.runtime import RayBackend, connect, reserve
from fedlpp_ray.train import DEFAULT

PHASES = ("client_compute", "overhead", "broadcast", "train", "aggregate", "evaluate")


def measure(experiment: Experiment) -> dict[str, Any]:
    """Run the experiment in a private cluster.

    Returns:
        `seconds`: median of each phase over the rounds, and of `total`; `overhead`: share of a
        round that is neither client compute nor evaluation; `start_up`: seconds;
        `memory`: peak resident MB by process.
    """
    with connect(), reserve(experiment) as group:
        start = time.perf_counter()
        with closing(RayBackend(experiment, group)) as backend:
            start_up = time.perf_counter() - start
            history = list(Federation(experiment, backend).run())
            memory = {"driver": _peak_megabytes()}
            memory["server actor"] = _peak_of(backend.server.actor)
            for number, host in enumerate(backend.pool.slots):
                memory[f"client actor {number}"] = _peak_of(host.actor)
    seconds = {
        phase: median(record.seconds[phase] for record in history) for phase in (*PHASES, "total")
    }
    overhead = seconds["overhead"] / seconds["total"]
    return {"seconds": seconds, "overhead": overhead, "start_up": start_up, "memory": memory}


def markdown(found: dict[str, Any]) -> str:
    """The result of `measure` as two tables."""
    seconds = found["seconds"]
    lines = ["| phase | seconds a round (median) | share |", "| --- | --- | --- |"]
    lines += [
        f"| {phase.replace('_', ' ')} | {seconds[phase]:.3f} "
        f"| {seconds[phase] / seconds['total']:.1%} |"
        for phase in (*PHASES, "total")
    ]
    lines += [
        "",
        f"Everything but client compute and evaluation: **{found['overhead']:.1%}** of a round. "
        f"Start-up of the actors, once a run: {found['start_up']:.1f} s.",
        "",
        "| process | peak memory, MB |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {megabytes:.0f} |" for name, megabytes in found["memory"].items()]
    return "\n".join(lines)


def _peak_megabytes(_actor: Any = None) -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _peak_of(actor: Any) -> float:
    return float(ray.get(actor.__ray_call__.remote(_peak_megabytes)))


def default_experiment() -> Experiment:
    """The shipped default, evaluated every round."""
    return load_experiment(DEFAULT, ["evaluation.every=1"])


if __name__ == "__main__":
    print(markdown(measure(default_experiment())))
