"""The federations that both sides run, and the form in which the Flower app takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlpp_ray.assets import locate
from fedlpp_ray.config import Experiment, load_experiment
from fedlpp_ray.tasks import Examples, load_task, share_out

ROOT = Path(__file__).parents[2]
WORKERS = 2
FLOWER = "Flower"
"""Its base, beside those of `Setting.bases`."""
PLAIN = (
    "downlink.bits=full",
    "uplink.bits=32",
    "lora.rank=8",
    "federation.client_fraction=null",
    "federation.partition=iid",
    "client.schedule=constant",
    "client.warmup=0.0",
    "client.lr=1e-3",
    "task.held_out=8",
    "evaluation.every=100000",
    f"runtime.client_actors={WORKERS}",
    "runtime.threads=1",
)
"""Full precision both ways, equal shares, and of evaluation no more than the end of a run needs."""


@dataclass(frozen=True)
class Setting:
    """One federation.

    Attributes:
        name: As a row of the table and the option `--only` have it.
        title: What it is, for a reader.
        config: Of ours, from the repository's root.
        keys: Its overrides, beside `PLAIN`.
        target: Rounds per second of ours over Flower's that are aimed at.
        rounds: Measured rounds of a run; one before them warms up.
        bases: Overrides for each base of our clients, by name.
    """

    name: str
    title: str
    config: str
    keys: tuple[str, ...]
    target: float
    rounds: int
    bases: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"32 bits": ()})

    def experiment(self, base: str, rounds: int) -> Experiment:
        """Ours, with one of `bases`."""
        return load_experiment(ROOT / self.config, self.overrides(base, rounds))

    def overrides(self, base: str, rounds: int) -> list[str]:
        """Of the configuration file, as a command line takes them."""
        return [*PLAIN, *self.keys, *self.bases[base], f"federation.rounds={rounds}"]


def _federation(clients: int, cohort: int, steps: int, texts: int) -> tuple[str, ...]:
    return (
        f"federation.clients={clients}",
        f"federation.cohort={cohort}",
        f"federation.local_steps={steps}",
        f"client.batch_size={texts}",
    )


SETTINGS = (
    Setting(
        name="long",
        title="MiniLM, TREC: 3 of 10 clients x 10 steps x 16 texts",
        config="configs/methods/fedit.yaml",
        keys=_federation(10, 3, 10, 16),
        target=1.2,
        rounds=5,
    ),
    Setting(
        name="many",
        title="MiniLM, TREC: 30 of 100 clients x 1 step x 4 texts",
        config="configs/methods/fedit.yaml",
        keys=_federation(100, 30, 1, 4),
        target=2.5,
        rounds=5,
    ),
    Setting(
        name="smollm2",
        title="SmolLM2, 4-bit base, botocore: 6 of 100 clients x 2 steps x 4 texts",
        config="configs/botocore_smollm2.yaml",
        keys=(*_federation(100, 6, 2, 4), "generation.examples=0", "client.base_bits=4"),
        target=3.0,
        rounds=2,
        bases={
            "packed": ("client.dequantize_at_load=false",),
            "dequantize_at_load": ("client.dequantize_at_load=true",),
            "bitsandbytes": (
                "client.dequantize_at_load=false",
                "client.base_format=bitsandbytes",
            ),
        },
    ),
)


def app_config(setting: Setting, rounds: int, folder: Path) -> dict[str, Any]:
    """What the Flower app is told; every client's texts are written into `folder`.

    Args:
        setting: Which federation.
        rounds: How many to run.
        folder: Exists.

    Raises:
        AssetError, TaskError: the model or the data cannot be used.
    """
    experiment = setting.experiment(next(iter(setting.bases)), rounds)
    shares = folder / "shares.json"
    labels = _write_shares(experiment, shares)
    federation, client = experiment.federation, experiment.client
    return {
        "model": str(model_folder(experiment)),
        "shares": str(shares),
        "labels": labels,
        "clients": federation.clients,
        "cohort": federation.cohort_size,
        "rounds": rounds,
        "workers": WORKERS,
        "local-steps": federation.steps(0, client.batch_size),
        "batch-size": client.batch_size,
        "lr": client.lr,
        "weight-decay": client.weight_decay,
        "rank": experiment.lora.rank,
        "alpha": experiment.lora.alpha,
        "max-length": experiment.task.max_length,
        "max-new-tokens": experiment.generation.max_new_tokens,
        "separator": experiment.generation.separator,
    }


def model_folder(experiment: Experiment) -> Path:
    """The pretrained model as a Hugging Face folder; a GGUF file is converted once.

    Raises:
        AssetError: it is not there, or cannot be converted.
    """
    path = locate(experiment.model.name)
    assert path is not None  # the settings name files of installed packages
    if path.suffix != ".gguf":
        return path
    from fedlpp_ray.models import gguf  # imports torch

    return gguf.as_folder(path)


def _write_shares(experiment: Experiment, file: Path) -> int:
    """Write each client's pairs of text and label; returns the number of labels.

    Of a text to be written the label is the text, and there are 0.
    """
    task = load_task(experiment.task)
    _, train, partition = share_out(
        task.train, experiment.federation, experiment.seed, experiment.server.examples
    )
    shares: list[list[tuple[str, Any]]] = []
    for client in range(len(partition)):
        own = train.take(partition.indices(client).tolist())
        if isinstance(own, Examples):
            shares.append(list(zip(own.texts, own.labels, strict=True)))
        else:
            shares.append([(p, r[0]) for p, r in zip(own.prompts, own.references, strict=True)])
    file.write_text(json.dumps(shares), encoding="utf-8")
    return len(task.labels) if isinstance(train, Examples) else 0
