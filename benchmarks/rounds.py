"""A round in Ray against the same local steps in a bare loop of PyTorch and PEFT.

    python -m benchmarks.rounds [--quick] [--into benchmarks/README.md]
    python -m benchmarks.rounds --gpu [--quick] [--into benchmarks/README.md] [KEY=VALUE ...]

The bare loop runs in as many processes as there are client actors, with their threads and their
niceness: the same model, base format, clients, batches, loss and optimizer, for each client no more
than the adapter set back and a fresh AdamW. Both sides stay loaded and take turns, some rounds at a
time. A round is all between two rounds' ends: sampling, broadcast, schedule, transport, decoding,
training, checks, aggregation. Evaluation is left out on either side, and so is each turn's first
round. `beyond arithmetic` is what is left of a worker's time per client.

With `--gpu` clients have bitsandbytes' nf4 and compute in bf16, and 1, 2 and 4 of them share a card
(`runtime.client_gpus` 1, 0.5, 0.25); the bare loop is a plain QLoRA in as many processes at once.
Further arguments override keys, e.g. `model.name=...` of a larger model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median

from benchmarks import page
from benchmarks.bare import Bare, bare
from fedlpp_ray.config import Experiment, load_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.runtime import RayBackend, connect, reserve
from fedlpp_ray.train import DEFAULT

NAME = "benchmarks.rounds"
NAME_GPU = "benchmarks.rounds --gpu"
BOTOCORE = "configs/botocore_smollm2.yaml"
NOT_EVALUATED = ("evaluation.every=100000", "evaluation.server=false", "task.held_out=8")
ROUNDS, TURNS = 3, 2
"""Measured rounds of a turn, and turns of each side."""


@dataclass(frozen=True)
class Setting:
    """One federation.

    Attributes:
        title: What it is.
        config: YAML file.
        keys: `key=value` overrides, beside `NOT_EVALUATED`; of a key given twice the last counts.
        workers: Client actors, and processes of the bare loop.
        target: Of the ratio, or None where it is only reported.
        model: Of the bare loop: `ours` or `qlora`.
    """

    title: str
    config: str
    keys: tuple[str, ...]
    workers: int
    target: float | None
    model: str = "ours"

    def overrides(self, rounds: int) -> list[str]:
        """Of the configuration file; one round more than is measured."""
        own = [f"runtime.client_actors={self.workers}", f"federation.rounds={rounds + 1}"]
        keys = dict(key.split("=", 1) for key in (*NOT_EVALUATED, *self.keys, *own))
        return [f"{key}={value}" for key, value in keys.items()]

    def experiment(self, rounds: int) -> Experiment:
        """Of so many measured rounds."""
        return load_experiment(self.config, self.overrides(rounds))


@dataclass(frozen=True)
class Row:
    """Seconds of each measured round of a setting, on both sides.

    Attributes:
        setting: Which.
        cohort: Clients a round.
        ours: In Ray.
        bare: In the bare loop.
        tokens: That are trained in a round on average, without padding.
    """

    setting: Setting
    cohort: int
    ours: Sequence[float]
    bare: Sequence[float]
    tokens: float

    @property
    def ratio(self) -> float:
        """A round of ours over one of the bare loop, medians."""
        return median(self.ours) / median(self.bare)

    @property
    def beyond(self) -> float:
        """Seconds of a worker per client beyond arithmetic."""
        return (median(self.ours) - median(self.bare)) * self.setting.workers / self.cohort


def cpu_settings() -> list[Setting]:
    """Those of the first table."""
    minilm = {
        "the default": ((80, 4, 10, 8), 1.05),
        "compute-bound": ((40, 2, 10, 16), 1.05),
        "tiny clients": ((100, 30, 1, 4), None),
    }
    found = []
    for name, ((clients, cohort, steps, texts), target) in minilm.items():
        title = f"MiniLM, {name}: {cohort} clients x {steps} step(s) x {texts} texts"
        keys = (
            "federation.client_fraction=null",
            f"federation.clients={clients}",
            f"federation.cohort={cohort}",
            f"federation.local_steps={steps}",
            f"client.batch_size={texts}",
        )
        found += [Setting(title, DEFAULT, keys, workers, target) for workers in (1, 2)]
    smollm2 = Setting(
        "SmolLM2, packed 4 bits: 4 clients x 2 steps x 8 texts",
        BOTOCORE,
        ("federation.local_steps=2", "client.dequantize_at_load=false", "generation.examples=0"),
        workers=2,
        target=1.05,
    )
    return [*found, smollm2]


def gpu_settings(keys: Sequence[str], shares: Sequence[float] = (1, 0.5, 0.25)) -> list[Setting]:
    """One for each share of a card that a client actor has."""
    fixed = (
        "client.base_bits=4",
        "client.base_format=bitsandbytes",
        "client.dequantize_at_load=false",
        "client.compute=bf16",
        "client.batch_size=16",
        "client.schedule=constant",
        "client.warmup=0.0",
        "federation.cohort=8",
        "federation.local_steps=10",
        "generation.examples=0",
        "task.max_length=256",
    )
    return [
        Setting(
            f"{round(1 / share) if share else 1} on a card",
            BOTOCORE,
            (*fixed, f"runtime.client_gpus={share}", *keys),
            workers=round(1 / share) if share else 1,
            target=0.97,
            model="qlora",
        )
        for share in shares
    ]


def measure(setting: Setting, rounds: int, turns: int) -> Row:
    """Run both sides in turn."""
    experiment = setting.experiment(rounds)
    arguments = (setting.config, setting.overrides(rounds), setting.workers)
    ours: list[float] = []
    theirs: list[tuple[float, int]] = []
    with (
        bare(*arguments, experiment.runtime.environment, setting.model) as loop,
        reserve(experiment) as group,
        closing(RayBackend(experiment, group)) as backend,
    ):
        backend.pool.until(lambda: len(backend.pool.working) == setting.workers)
        for _ in range(turns):
            theirs += _bare_rounds(loop, rounds)
            ours += _rounds(experiment, backend)
            backend.begin(experiment)
            backend.pool.until(lambda: len(backend.pool.working) == setting.workers)
    seconds, tokens = zip(*theirs, strict=True)
    cohort = experiment.federation.cohort_size
    return Row(setting, cohort, ours, seconds, sum(tokens) / len(tokens))


def _rounds(experiment: Experiment, backend: RayBackend) -> list[float]:
    """Seconds from one round's end to the next, all but the first; the last is evaluated."""
    history = list(Federation(experiment, backend).run())[1:]
    return [record.seconds["total"] - record.seconds["evaluate"] for record in history]


def _bare_rounds(loop: Bare, rounds: int) -> list[tuple[float, int]]:
    """Seconds and tokens of the same rounds."""
    return [loop.round(number) for number in range(1, rounds + 2)][1:]


def markdown(found: Sequence[Row]) -> str:
    """A row a setting."""
    columns = ["setting", "processes", "bare loop, s/round", "Ray, s/round", "ratio", "target"]
    cells = [
        [
            row.setting.title,
            str(row.setting.workers),
            f"{median(row.bare):.3f}",
            f"{median(row.ours):.3f}",
            f"**{row.ratio:.3f}**",
            f"at most {row.setting.target}" if row.setting.target else "-",
            f"{1000 * row.beyond:.1f}",
        ]
        for row in found
    ]
    return page.rows([*columns, "beyond arithmetic, ms/client"], cells)


def gpu_markdown(found: Sequence[Row]) -> str:
    """A row a packing."""
    columns = ["clients on a card", "plain QLoRA, tokens/s", "Ray, tokens/s", "ratio", "target"]
    cells = [
        [
            str(row.setting.workers),
            f"{row.tokens / median(row.bare):.0f}",
            f"{row.tokens / median(row.ours):.0f}",
            f"**{1 / row.ratio:.3f}**",
            f"at least {row.setting.target}",
        ]
        for row in found
    ]
    return page.rows(columns, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = page.parser(NAME, __doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, against plain QLoRA")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="with --gpu")
    options = parser.parse_args(arguments)
    if options.gpu:
        _check_gpu()
    settings = gpu_settings(options.keys) if options.gpu else cpu_settings()
    rounds, turns = (1, 1) if options.quick else (ROUNDS, TURNS)
    if options.quick:
        settings = settings[:2]

    def table() -> str:
        with connect(settings[0].experiment(rounds).runtime):
            found = []
            for setting in settings:
                print(setting.title, "...", file=sys.stderr, flush=True)
                found.append(measure(setting, rounds, turns))
        return (gpu_markdown if options.gpu else markdown)(found)

    page.deliver(NAME_GPU if options.gpu else NAME, options, table)


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: --gpu: CUDA is not available here")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
