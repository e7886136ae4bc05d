"""What a client's step and an evaluation cost beside the arithmetic that their result needs.

    python -m benchmarks.arithmetic [--quick] [--into benchmarks/README.md]
    python -m benchmarks.arithmetic --utility [--into benchmarks/README.md]

The first is on one CPU thread, each variant in turn, best of several. The bare loop is what a
person would write with PEFT: DataLoader, `model(**batch).loss`, AdamW, a scheduler; its batches,
model and base are those of `Training`. Ratios are to the first row of a group. With `--utility`,
the default experiment is run whole in fp32 and in bf16.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from benchmarks import page
from fedlpp_ray.config import Experiment, load_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.emulation import load_client_base
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.lora import add_lora, store_in_bf16, trainable
from fedlpp_ray.seeds import generator
from fedlpp_ray.tasks import collate, epoch_order
from fedlpp_ray.train import DEFAULT
from fedlpp_ray.training import Training, configure_torch

SHORT = ["task.held_out=16", "generation.examples=8", "generation.max_new_tokens=16"]
PACKED = ["client.base_bits=4", "client.dequantize_at_load=false"]
BOTOCORE = "configs/botocore_smollm2.yaml"
NAME = "benchmarks.arithmetic"
EXPERIMENTS = {
    "MiniLM, TREC": (DEFAULT, []),
    "SmolLM2, botocore, 4 bits": (BOTOCORE, [*SHORT, *PACKED]),
}
STEPS, REPEATS, SEEDS = 8, 3, 3


def measure(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Seconds of each variant, in two groups: `step` and `evaluation`."""
    device = configure_torch(threads=1, gpus=0)
    text = FederatedText(experiment)
    model, half = _model(experiment, text), store_in_bf16(_model(experiment, text))
    grouped = experiment.with_values({"client.group_by_length": True})

    def evaluate(one: nn.Module, *, merge: bool) -> None:
        target = "fedlpp_ray.training.evaluation.merged"
        with nullcontext() if merge else patch(target, lambda *_: nullcontext()):
            text.evaluate(one, device)

    steps = {
        "bare loop with PEFT": lambda: _bare(model, experiment, text),
        "Training": lambda: _training(model, experiment, text, device),
        "Training, MKL": lambda: _with_mkl(lambda: _training(model, experiment, text, device)),
        "Training, group_by_length": lambda: _training(model, grouped, text, device),
        "Training, bf16": lambda: _training(half, experiment, text, device),
    }
    evaluations = {
        "adapters apart": lambda: evaluate(model, merge=False),
        "merged": lambda: evaluate(model, merge=True),
        "merged, MKL": lambda: _with_mkl(lambda: evaluate(model, merge=True)),
        "adapters apart, bf16": lambda: evaluate(half, merge=False),
        "merged, bf16": lambda: evaluate(half, merge=True),
    }
    return {"step": _best(steps, STEPS), "evaluation": _best(evaluations, 1)}


def padding(experiment: Experiment) -> dict[str, float]:
    """Share of all clients' batches, over one epoch, that is padding."""
    text, size = FederatedText(experiment), experiment.client.batch_size
    found = {}
    for by_length in (False, True):
        real = padded = 0
        for client in range(len(text.partition)):
            examples = text.client(client)
            order = epoch_order(examples, size, generator(client, "order"), by_length=by_length)
            for batch in _cut(order, size):
                lengths = [examples[i][0].shape[-1] for i in batch]
                real, padded = real + sum(lengths), padded + max(lengths) * len(lengths)
        found["by length" if by_length else "by chance"] = 1 - real / padded
    return found


def utility() -> list[dict[str, Any]]:
    """The server's accuracy and loss after the default experiment, by format and seed."""
    rows = []
    for seed in range(SEEDS):
        for compute in ("fp32", "bf16"):
            keys = [f"client.compute={compute}", f"seed={seed}", "evaluation.every=10"]
            experiment = load_experiment(DEFAULT, keys)
            last = list(Federation(experiment, InProcess(experiment)).run())[-1].evaluation
            assert last is not None
            assert last.server is not None
            row = {key: last.server[key] for key in ("accuracy", "loss")}
            rows.append({"compute": compute, "seed": seed, **row})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def markdown(name: str, found: dict[str, dict[str, float]], shares: dict[str, float]) -> str:
    """The results of `measure` and `padding` as a table and a line."""
    lines = [f"| {name} | seconds | ratio |", "| --- | --- | --- |"]
    for group, rows in found.items():
        first = next(iter(rows.values()))
        lines += [f"| {group}: {k} | {v:.4f} | {v / first:.2f} |" for k, v in rows.items()]
    said = ", ".join(f"{share:.1%} {how}" for how, share in shares.items())
    return "\n".join([*lines, "", f"Padding in an epoch of all clients: {said}."])


def utility_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of `utility` as a table: mean and standard deviation over the seeds."""
    lines = [f"| compute | accuracy ({SEEDS} seeds) | loss |", "| --- | --- | --- |"]
    for compute in ("fp32", "bf16"):
        own = [row for row in rows if row["compute"] == compute]
        cells = [[row[key] for row in own] for key in ("accuracy", "loss")]
        shown = [f"{mean(cell):.4f} ± {stdev(cell):.4f}" for cell in cells]
        lines.append(f"| {compute} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _model(experiment: Experiment, text: FederatedText) -> nn.Module:
    model: nn.Module = add_lora(
        load_client_base(experiment, text), experiment.lora, experiment.seed
    )
    return model


def _training(
    model: nn.Module, experiment: Experiment, text: FederatedText, device: torch.device
) -> None:
    options: dict[str, Any] = {"seed": 0, "pad": text.pad, "device": device}
    Training(model, text.client(0), experiment.client, steps=STEPS, **options).run()


def _with_mkl(run: Callable[[], None]) -> None:
    """Without oneDNN for frozen layers."""
    with patch("fedlpp_ray.models.linear.prefers_onednn", lambda: False):
        run()


def _bare(model: nn.Module, experiment: Experiment, text: FederatedText) -> None:
    config, examples = experiment.client, text.client(0)
    batches = _batches(len(examples), config.batch_size)
    loader: Any = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=lambda chosen: collate(chosen, text.pad),
    )
    parameters = trainable(model).values()
    optimizer = AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss.item()
    model.eval()


def _batches(examples: int, size: int) -> list[list[int]]:
    """Those of `Training` with seed 0."""
    random, found = generator(0, "order"), list[list[int]]()
    while len(found) < STEPS:
        found += _cut(torch.randperm(examples, generator=random).tolist(), size)
    return found[:STEPS]


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _best(variants: dict[str, Callable[[], None]], units: int) -> dict[str, float]:
    best = dict.fromkeys(variants, math.inf)
    for _ in range(REPEATS):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - start) / units)
    return best


def main() -> None:
    """Measure, print, write."""
    parser = page.parser(NAME, __doc__)
    parser.add_argument("--utility", action="store_true", help="fp32 and bf16, the default trained")
    options = parser.parse_args()
    if options.utility:
        page.deliver(f"{NAME} --utility", options, lambda: utility_markdown(utility()))
        return

    def tables() -> str:
        names = list(EXPERIMENTS)[: 1 if options.quick else None]
        found = {name: load_experiment(*EXPERIMENTS[name]) for name in names}
        return "\n\n".join(markdown(n, measure(e), padding(e)) for n, e in found.items())

    page.deliver(NAME, options, tables)


if __name__ == "__main__":
    main()
