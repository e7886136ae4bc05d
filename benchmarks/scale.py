"""Broadcast and aggregation against the adapter's size and the cohort, with synthetic updates.

    python -m benchmarks.scale [--quick] [--into benchmarks/README.md]

An adapter of so many MiB is as many layers of rank 16 and width 8192, in fp32. The server's side is
an `Aggregator` in a process of its own, on one thread: every update is decoded, checked and added
to the exact sums, as in a run; nothing is extrapolated, but not every size meets every cohort. Its
peak memory is beyond its imports. Two references are taken in the same process: a memory copy of
the adapter's bytes, and a plain mean, which loads the same message without a check and adds it in
float64. The broadcast has 4 bits, updates fp32: the defaults.

Through Ray: a broadcast in the object store is put once and read by four actors at once.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ray
import safetensors.torch
import torch

from benchmarks import page
from fedlpp_ray.aggregation import make_optimizer
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.aggregator import Aggregator
from fedlpp_ray.federation.opening import Opening
from fedlpp_ray.federation.records import Assignment
from fedlpp_ray.federation.wire import Wire
from fedlpp_ray.messages import Envelope, decode, encode
from fedlpp_ray.runtime import connect
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import Schema, State

NAME = "benchmarks.scale"
RANK, WIDTH = 16, 8192
GRID = (
    *((1, 10), (1, 100), (1, 1000)),
    *((10, 10), (10, 100), (10, 1000)),
    *((100, 10), (100, 100)),
    (1000, 10),
)
"""MiB of the adapter, and clients."""
READERS = 4
REPEATS, LONG = 3, 2.0
FIRST = 1_000_000
"""Number of the first client: those that follow have as many digits."""


def schema(megabytes: int) -> Schema:
    """An adapter of so many MiB in fp32."""
    return {
        f"model.{layer:04d}.lora_{factor}.weight": shape
        for layer in range(megabytes)
        for factor, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    }


def experiment(cohort: int) -> Experiment:
    """The default one, with the synthetic adapter's rank."""
    keys = {"federation.clients": max(cohort, 2), "federation.cohort": cohort, "lora.rank": RANK}
    return Experiment().with_values({"server.max_update_norm": 1e9, **keys})


def random_state(of: Schema, seed: int) -> State:
    """Values as of an adapter that has been trained a little."""
    random = torch.Generator().manual_seed(seed)
    return {name: 0.01 * torch.randn(shape, generator=random) for name, shape in of.items()}


def make(megabytes: int, cohort: int, folder: Path) -> dict[str, float]:
    """Write a broadcast and the update of client `FIRST`; seconds of their codecs."""
    wire = Wire(experiment(cohort), schema(megabytes))
    state = random_state(schema(megabytes), 0)
    payloads: dict[str, bytes] = {}

    def broadcast() -> None:
        payloads["broadcast"] = encode(wire.envelope(1, RANK), state, wire.downlink)

    def update() -> None:
        payloads["update"] = encode(Envelope("update", 1, FIRST, 1), state, wire.uplink)

    def read() -> None:
        decode(payloads["broadcast"], wire.envelope(1, RANK), wire.broadcast(RANK), wire.downlink)

    found = {"encode": best(broadcast), "read": best(read), "encode update": best(update)}
    for name, payload in payloads.items():
        (folder / name).write_bytes(payload)
    return found | {"broadcast MB": len(payloads["broadcast"]) / 2**20}


def receive(megabytes: int, cohort: int, folder: Path) -> dict[str, float]:
    """The server's side of a round; seconds of an update and of the end, and peak memory in MB."""
    _warm_up()
    broadcast = (folder / "broadcast").read_bytes()
    reset_peak()
    before = resident("VmRSS")
    aggregator = _open(megabytes, cohort, broadcast)
    clients = range(FIRST, FIRST + cohort)
    seconds = [_receive_one(aggregator, folder / "update", client) for client in clients]
    start = time.perf_counter()
    _close(aggregator)
    close, peak = time.perf_counter() - start, resident("VmHWM") - before
    del aggregator
    return {
        "receive": median(seconds),
        "all": sum(seconds),
        "close": close,
        "peak": peak,
        "plain": best(_plain((folder / "update").read_bytes(), schema(megabytes))),
        "copy": copy_seconds(megabytes * 2**20),
    }


def _open(megabytes: int, cohort: int, broadcast: bytes) -> Aggregator:
    clients = range(FIRST, FIRST + cohort)
    return Aggregator(
        Opening(
            experiment=experiment(cohort),
            schema=schema(megabytes),
            round=1,
            cohort=tuple(Assignment(client, 1) for client in clients),
            broadcasts={1: {RANK: broadcast}},
            examples=dict.fromkeys(clients, 1),
            unsent={},
        )
    )


def _close(aggregator: Aggregator) -> None:
    """Make the next state, as `Server.aggregate` does."""
    optimizer = make_optimizer("fedavg", aggregator.total.plan.schema, lr=1.0)
    aggregator.total.next_state(aggregator.own, aggregator.own, optimizer, generator(0, "end"))


def _warm_up() -> None:
    """Load whatever is loaded at the first use."""
    wire, state = Wire(experiment(2), schema(1)), random_state(schema(1), 0)
    aggregator = _open(1, 2, encode(wire.envelope(1, RANK), state, wire.downlink))
    aggregator.receive(FIRST, encode(Envelope("update", 1, FIRST, 1), state, wire.uplink))
    _close(aggregator)


def _receive_one(aggregator: Aggregator, update: Path, client: int) -> float:
    """Make the file that client's, read it, and time what the server does with it."""
    with update.open("r+b") as file:
        head = file.read(2**20)
        mark = b'\\"client\\": '
        file.seek(head.index(mark) + len(mark))
        file.write(str(client).encode())
        file.seek(0)
        payload = file.read()
    start = time.perf_counter()
    aggregator.receive(client, payload)
    return time.perf_counter() - start


def _plain(payload: bytes, of: Schema) -> Callable[[], None]:
    """Add a message to a float64 sum, and check nothing."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in of.items()}

    def add() -> None:
        for name, tensor in safetensors.torch.load(payload).items():
            total[name].add_(tensor.double(), alpha=0.1)

    return add


def copy_seconds(size: int) -> float:
    """Of a memory copy of so many bytes to memory that is there."""
    source, target = torch.ones(2, size, dtype=torch.uint8)
    return best(lambda: target.copy_(source))


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs; of one that takes long, of it alone."""
    found = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - start)
        if found > LONG:
            break
    return found


def resident(field: str) -> float:
    """`VmRSS`, or since `reset_peak` `VmHWM`, of this process in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Let `VmHWM` begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure(grid: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """A row for each size and cohort."""
    found = []
    for megabytes, cohort in grid:
        print(f"{megabytes} MiB x {cohort} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, float] = {"size": megabytes, "cohort": cohort}
            for part in ("make", "receive"):
                row |= _in_process(part, megabytes, cohort, folder)
        found.append(row)
    return found


def _in_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", NAME, *map(str, arguments)]
    environment = os.environ | Experiment().runtime.environment
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


class Reader:
    """An actor that reads a broadcast."""

    def size(self, broadcast: dict[int, bytes]) -> int:
        """Its bytes."""
        return sum(map(len, broadcast.values()))


def through_ray(sizes: Sequence[int]) -> list[dict[str, float]]:
    """Seconds to put so many MiB, and until all readers have them."""
    found = []
    with connect():
        made = ray.remote(Reader).options(num_cpus=0)
        readers: list[Any] = [made.remote() for _ in range(READERS)]
        ray.get([reader.size.remote({0: b""}) for reader in readers])
        for size in sizes:
            broadcast = {0: os.urandom(2**20) * size}
            row = {"size": size, "put": math.inf, "read": math.inf}
            for _ in range(REPEATS):
                start = time.perf_counter()
                reference = ray.put(broadcast)
                there = time.perf_counter()
                ray.get([reader.size.remote(reference) for reader in readers])
                row["put"] = min(row["put"], there - start)
                row["read"] = min(row["read"], time.perf_counter() - there)
                del reference
            found.append(row | {"copy": copy_seconds(size * 2**20)})
    return found


def markdown(found: Sequence[dict[str, float]], shared: Sequence[dict[str, float]]) -> str:
    """Both tables."""
    columns = [
        *("adapter, MiB", "cohort", "broadcast, MiB", "encode, x copy", "decode, x copy"),
        *("receive, s/update", "x copy", "x plain mean", "cohort, s", "end of round, x copy"),
        *("server's peak, MB", "peak, x adapter"),
    ]
    cells = [
        [
            f"{row['size']:.0f}",
            f"{row['cohort']:.0f}",
            f"{row['broadcast MB']:.2f}",
            *(f"{row[key] / row['copy']:.1f}" for key in ("encode", "read")),
            f"{row['receive']:.4f}",
            f"{row['receive'] / row['copy']:.1f}",
            f"**{row['receive'] / row['plain']:.1f}**",
            f"{row['all']:.2f}",
            f"{row['close'] / row['copy']:.1f}",
            f"{row['peak']:.0f}",
            f"{row['peak'] / row['size']:.1f}",
        ]
        for row in found
    ]
    ray_columns = ["message, MiB", "put, s", "put, x copy", f"{READERS} actors read, s"]
    ray_cells = [
        [
            f"{row['size']:.0f}",
            f"{row['put']:.4f}",
            f"{row['put'] / row['copy']:.1f}",
            f"{row['read']:.4f}",
            f"{row['read'] / row['copy'] / READERS:.1f}",
        ]
        for row in shared
    ]
    ray_table = page.rows([*ray_columns, "an actor's, x copy"], ray_cells)
    return f"{page.rows(columns, cells)}\n\n{ray_table}"


def main() -> None:
    """Measure, print, write."""
    options = page.parser(NAME, __doc__).parse_args()
    grid = ((1, 10), (1, 100)) if options.quick else GRID
    sizes = sorted({size for size, _ in grid})
    page.deliver(NAME, options, lambda: markdown(measure(grid), through_ray(sizes)))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("make", "receive"):
        torch.set_num_threads(1)
        part = {"make": make, "receive": receive}[sys.argv[1]]
        print(json.dumps(part(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main()
