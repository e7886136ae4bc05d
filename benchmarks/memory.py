"""Memory of client processes that share a base, and of a host against the number of clients.

    python -m benchmarks.memory [--quick] [--into benchmarks/README.md]

Each process makes the base of the named experiment, reads all of it and waits; what the kernel
then says of it (/proc/PID/smaps_rollup) is compared with before. PSS counts a page that k processes
map as 1/k in each; private is what would be freed if the process ended. `alone` loads and quantizes
in each process. Hosts have a tiny BERT and as many short texts as clients. Linux only.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import page

NAME = "benchmarks.memory"
EXPERIMENTS = {
    "MiniLM, fp32": ("configs/trec_minilm.yaml",),
    "MiniLM, packed 4 bits": ("configs/trec_minilm.yaml", "client.base_bits=4"),
    "SmolLM2, packed 4 bits": (
        "configs/botocore_smollm2.yaml",
        "client.dequantize_at_load=false",
    ),
    "SmolLM2, 4 bits, dequantize_at_load": ("configs/botocore_smollm2.yaml",),
}
PROCESSES = (1, 2, 4)
POPULATIONS = (10, 1_000, 100_000, 1_000_000)


def bases(
    experiments: Mapping[str, tuple[str, ...]], processes: Sequence[int] = PROCESSES
) -> list[dict[str, Any]]:
    """A row for each experiment, way of loading and number of processes; MB a process."""
    rows = []
    for name, arguments in experiments.items():
        _measure(1, "shared", arguments)  # fills the cache
        for way in ("alone", "shared"):
            for count in processes:
                rows.append({"base": name, "way": way} | _measure(count, way, arguments))
    return rows


def hosts(populations: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each population; MB of a client host beyond its imports."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            {"clients": count} | _measure(1, "host", (folder, str(count)), runs=2)
            for count in populations
        ]


def markdown(base_rows: list[dict[str, Any]], host_rows: list[dict[str, Any]]) -> str:
    """The rows as two tables."""
    lines = [
        "| base | size, MB | loaded | processes | PSS each, MB | private each, MB | PSS all, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['base']} | {row['size']:.0f} | {row['way']} | {row['processes']} "
        f"| {row['pss']:.0f} | {row['private']:.0f} | {row['pss'] * row['processes']:.0f} |"
        for row in base_rows
    ]
    lines += ["", "| clients | PSS of a host, MB | private, MB |", "| --- | --- | --- |"]
    lines += [
        f"| {row['clients']:,} | {row['pss']:.0f} | {row['private']:.0f} |" for row in host_rows
    ]
    return "\n".join(lines)


def _measure(count: int, way: str, arguments: tuple[str, ...], runs: int = 1) -> dict[str, Any]:
    """Start so many processes, wait until all are ready, and average what they have grown by."""
    for _ in range(runs - 1):  # the first has also made what is cached
        _measure(count, way, arguments)
    command = [sys.executable, "-m", "benchmarks.memory", way, *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        before = [_told(process) for process in started]
        for process in started:
            _tell(process)
        sizes = [_told(process)[0] for process in started]
        after = [_rollup(process.pid) for process in started]
    finally:
        for process in started:
            process.communicate()
    grown = [
        [b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)
    ]
    pss, private = (sum(values) / count for values in zip(*grown, strict=True))
    return {"processes": count, "size": sizes[0], "pss": pss, "private": private}


def _told(process: Any) -> list[float]:
    """The numbers of the next line that a process writes for this."""
    for line in process.stdout:
        if line.startswith("MB "):
            return [float(word) for word in line.split()[1:]]
    raise RuntimeError(f"a process ended: {process.args}")


def _tell(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def _rollup(pid: int | str = "self") -> list[float]:
    """PSS and private memory of a process, MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return [found["Pss"], found["Private_Clean"] + found["Private_Dirty"]]


def _child(way: str, arguments: list[str]) -> None:
    """Import, say how much memory that takes; when told, make what is measured and wait."""
    make = _host(*arguments) if way == "host" else _base(way, arguments)
    gc.collect()
    print("MB", *_rollup(), flush=True)
    sys.stdin.readline()
    kept, size = make()
    gc.collect()
    print("MB", size / 2**20, flush=True)
    sys.stdin.readline()
    del kept


def _base(way: str, arguments: list[str]) -> Callable[[], tuple[Any, int]]:
    from fedlpp_ray.config import load_experiment
    from fedlpp_ray.federation.data import FederatedText, base_of
    from fedlpp_ray.federation.emulation import load_client_base
    from fedlpp_ray.models import quantize_base, trained_modules

    experiment = load_experiment(arguments[0], arguments[1:])
    text = FederatedText(experiment)

    def make() -> tuple[Any, int]:
        if way == "shared":
            model = load_client_base(experiment, text)
        else:
            model, _ = base_of(experiment, text).load()
            quantize_base(model, experiment.client, trained_modules(model, experiment.adapter))
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            tensor.count_nonzero()  # every page is read, as training reads it
        return model, sum(tensor.nbytes for tensor in tensors)

    return make


def _host(folder: str, clients: str) -> Callable[[], tuple[Any, int]]:
    from fedlpp_ray.config import Experiment
    from fedlpp_ray.federation.client import ClientHost
    from tests import tiny

    root, count = Path(folder), int(clients)
    model = root / "model"
    if not model.exists():
        tiny.make_model(model)
    data = root / f"{count}.csv"
    if not data.exists():
        rows = tiny.make_rows(1000)
        tiny.write_csv(data, [rows[i % 1000] for i in range(max(count, 1000) + 100)])
    task = {"name": "classification", "data": str(data), "held_out": 100, "max_length": 16}
    federation = {"clients": count, "cohort": 4, "min_examples": 1}
    values = {"model": {"name": str(model)}, "task": task, "federation": federation}
    experiment = Experiment.from_dict(values)
    return lambda: (ClientHost(experiment), 0)


def main() -> None:
    """Measure, print, write."""
    options = page.parser(NAME, __doc__).parse_args()

    def tables() -> str:
        if options.quick:
            name = next(iter(EXPERIMENTS))
            return markdown(bases({name: EXPERIMENTS[name]}, (1,)), hosts(POPULATIONS[:1]))
        return markdown(bases(EXPERIMENTS), hosts(POPULATIONS))

    page.deliver(NAME, options, tables)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("alone", "shared", "host"):
        _child(sys.argv[1], sys.argv[2:])
    else:
        main()
