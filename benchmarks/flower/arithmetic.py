"""The local steps alone: a bare loop of forward, backward and step on one thread.

    python -m benchmarks.flower.arithmetic SETTING CONFIG OUT CLIENT

Flower's model and ours on each of its bases take turns with the same client's texts. What a worker
of either side spends beyond this is not arithmetic.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.flower.app import task
from benchmarks.flower.settings import FLOWER, SETTINGS, Setting
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.emulation import load_client_base
from fedlpp_ray.lora import add_lora

REPEATS = 4
NICENESS = 15
"""That of Ray's workers."""


def measure(setting: Setting, config: dict[str, Any], client: int) -> dict[str, float]:
    """Median seconds of a client's steps, by base; `FLOWER` is that of the Flower app.

    Raises:
        ValueError: two models train different numbers of parameters.
    """
    models = {FLOWER: task.get_model(config)}
    models |= {base: _ours(setting, base) for base in setting.bases}
    sizes = {name: _trained(model) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"trained parameters differ: {sizes}")
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + REPEATS):
        for name, model in models.items():
            torch.manual_seed(client)  # the same batches for all
            found[name].append(task.train(model, task.load_data(client, config), config)[1])
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def _ours(setting: Setting, base: str) -> Any:
    experiment = setting.experiment(base, rounds=1)
    loaded = load_client_base(experiment, FederatedText(experiment))
    return add_lora(loaded, experiment.lora, experiment.seed)


def _trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main(name: str, config: Path, out: Path, client: int) -> None:
    """Measure one setting and write the result."""
    os.nice(NICENESS)
    torch.set_num_threads(1)
    setting = next(setting for setting in SETTINGS if setting.name == name)
    found = measure(setting, json.loads(config.read_text(encoding="utf-8")), client)
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
