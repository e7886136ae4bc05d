"""How long a run takes to go on after a fault, for the default experiment (MiniLM, TREC).

    python -m benchmarks.recovery [--quick] [--into benchmarks/README.md]

Processes are killed with SIGKILL, a node's all at once, in the middle of a client's training in
round 4, after two undisturbed rounds whose median is the usual time of a round. `next result` is
from the kill to the next update that the server accepts; `ratio` that of round 4 to the usual time.
Of a run whose driver was killed: to the first checkpoint after `train --resume`, which begins at
once, with the start of Ray and of all actors. Nothing is evaluated in between.

A node is one of a cluster on this machine (`ray.cluster_utils`), with another one in reserve: what
a real network adds is not in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any
from unittest.mock import patch

import ray
from ray.cluster_utils import Cluster

from benchmarks import page
from benchmarks.rounds import NOT_EVALUATED
from fedlpp_ray.config import Experiment, load_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.runtime import RayBackend, connect, reserve
from fedlpp_ray.runtime.cohort import CohortTraining
from fedlpp_ray.runtime.jobs import Job
from fedlpp_ray.storage import RunFolder
from fedlpp_ray.train import DEFAULT

NAME = "benchmarks.recovery"
ROUND = 4
KEYS = (*NOT_EVALUATED, f"federation.rounds={ROUND + 1}")
REPEATS = 2
"""Of the death of an actor; a node and a driver die once."""
Strike = Callable[[Any], None]
"""Does the damage; is given the client actor that trains."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        after: Seconds from the kill to the next accepted result.
        round: Seconds of the round in which it happened.
        usual: Seconds of a round before.
    """

    after: float
    round: float
    usual: float


@dataclass
class Log:
    """What happened when.

    Attributes:
        struck: When the damage was done.
        accepted: When the server accepted each update.
        rounds: When each round ended.
    """

    struck: float | None = None
    accepted: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def fault(self) -> Fault:
        """What the fault cost."""
        assert self.struck is not None
        after = next(at for at in self.accepted if at > self.struck) - self.struck
        took = [b - a for a, b in pairwise(self.rounds)]
        return Fault(after, took[ROUND - 2], median(took[: ROUND - 2]))


@contextmanager
def watched(log: Log, strike: Strike) -> Iterator[None]:
    """Strike half-way through the first client of round `ROUND`, and note what is accepted."""
    begin, judged = Job.begin, CohortTraining._judge

    def strike_now(actor: Any) -> None:
        log.struck = time.perf_counter()
        strike(actor)

    def begun(self: Job, actor: Any) -> Any:
        references = begin(self, actor)
        if self.name.startswith(f"round {ROUND},") and log.struck is None:
            log.struck = float("inf")
            Timer(self.seconds / 2, strike_now, [actor]).start()
        return references

    def is_judged(self: CohortTraining, job: Job, report: Any, verdict: Any) -> None:
        judged(self, job, report, verdict)
        if report.client in self._accepted:
            log.accepted.append(time.perf_counter())

    with patch.object(Job, "begin", begun), patch.object(CohortTraining, "_judge", is_judged):
        yield


def run(experiment: Experiment, backend: RayBackend, strike: Strike) -> Fault:
    """One run with one fault."""
    log = Log()
    with watched(log, strike):
        for _ in finished_rounds(Federation(experiment, backend)):
            log.rounds.append(time.perf_counter())
    return log.fault()


def actors(repeats: int, keys: Sequence[str]) -> dict[str, list[Fault]]:
    """Faults of single processes."""
    found: dict[str, list[Fault]] = {}
    for workers in (2, 1):
        experiment = _experiment(keys, workers)
        with (
            connect(experiment.runtime),
            reserve(experiment) as group,
            closing(RayBackend(experiment, group)) as backend,
        ):
            name = "client actor, one of two" if workers == 2 else "client actor, the only one"
            found[name] = [_lose(backend, experiment, "client") for _ in range(repeats)]
            if workers == 2:
                name = "server actor, with two client actors"
                found[name] = [_lose(backend, experiment, "server") for _ in range(repeats)]
    return found


def _experiment(keys: Sequence[str], workers: int) -> Experiment:
    return load_experiment(DEFAULT, [*KEYS, *keys, f"runtime.client_actors={workers}"])


def _lose(backend: RayBackend, experiment: Experiment, which: str) -> Fault:
    """Kill the process of a client actor at work, or of the server."""
    backend.begin(experiment)
    backend.pool.until(lambda: all(slot in backend.pool.working for slot in backend.pool.slots))
    clients = [(slot.actor, _pid(slot.actor)) for slot in backend.pool.slots]
    server = _pid(backend.server.actor)

    def strike(actor: Any) -> None:
        pid = next(pid for known, pid in clients if known is actor)
        os.kill(server if which == "server" else pid, signal.SIGKILL)

    return run(experiment, backend, strike)


def _pid(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def nodes(keys: Sequence[str]) -> dict[str, list[Fault]]:
    """The node of the only client actor, in a cluster of three and a head."""
    whole = ("runtime.client_cpus=1", "runtime.server_cpus=1")
    experiment = _experiment([*keys, *whole], 1)
    return {"node of the only client actor, another in reserve": [_lose_node(experiment)]}


def _lose_node(experiment: Experiment) -> Fault:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        with patch.dict(os.environ, {"RAY_ADDRESS": cluster.address}):
            for _ in range(3):
                cluster.add_node(num_cpus=1)
            with (
                connect(experiment.runtime),
                reserve(experiment) as group,
                closing(RayBackend(experiment, group)) as backend,
            ):
                place = backend.pool.slots[0].place
                assert place is not None
                (node,) = (n for n in cluster.worker_nodes if n.node_id == place.node)
                strike = lambda _: cluster.remove_node(node, allow_graceful=False)  # noqa: E731
                return run(experiment, backend, strike)
    finally:
        cluster.shutdown()


def drivers(keys: Sequence[str]) -> dict[str, list[Fault]]:
    """The process of `train`, which is then started anew with --resume."""
    return {"driver, then `train --resume`": [_lose_driver(keys)]}


def _lose_driver(keys: Sequence[str]) -> Fault:
    overrides = [*KEYS, *keys]
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent) / "run"
        folder = RunFolder(path, load_experiment(DEFAULT, overrides))
        command = [sys.executable, "-m", "fedlpp_ray.train", DEFAULT, *overrides]
        command += ["--output", str(path)]
        with _started(command, Path(parent) / "log") as driver:
            times = [_saved(folder, number, driver) for number in range(1, ROUND)]
            usual = median(b - a for a, b in pairwise(times))
            time.sleep(usual / 2)
            driver.kill()
            struck = time.perf_counter()
            driver.wait()
        with _started([*command, "--resume"], Path(parent) / "log") as driver:
            saved = _saved(folder, ROUND, driver)
            driver.wait()
    return Fault(saved - struck, saved - times[-1], usual)


@contextmanager
def _started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield process
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {log.read_text(encoding='utf-8')}") from None
    finally:
        process.terminate()
        process.wait()


def _saved(folder: RunFolder, round: int, driver: subprocess.Popen[bytes]) -> float:
    """When the checkpoint of a round is there."""
    while folder.rounds < round:
        if driver.poll() is not None:
            raise RuntimeError("a run ended")
        time.sleep(0.01)
    return time.perf_counter()


def markdown(found: dict[str, list[Fault]]) -> str:
    """A row a kind of fault, medians."""
    columns = ["killed", "next result after, s", "usual round, s", "round with it, s", "ratio"]
    cells = [
        [
            name,
            f"**{median(f.after for f in faults):.1f}**",
            f"{median(f.usual for f in faults):.1f}",
            f"{median(f.round for f in faults):.1f}",
            f"{median(f.round / f.usual for f in faults):.1f}",
        ]
        for name, faults in found.items()
    ]
    return page.rows(columns, cells)


def main() -> None:
    """Measure, print, write."""
    options = page.parser(NAME, __doc__).parse_args()

    def table() -> str:
        if options.quick:
            return markdown(drivers(["federation.local_steps=1"]))
        return markdown(actors(REPEATS, []) | nodes([]) | drivers([]))

    page.deliver(NAME, options, table)


if __name__ == "__main__":
    main()
