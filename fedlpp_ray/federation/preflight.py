"""What can be checked of experiments before any compute is spent on them."""

from __future__ import annotations

from collections.abc import Iterable

from fedlpp_ray.assets import locate
from fedlpp_ray.config import Experiment
from fedlpp_ray.tasks import load_task, partition


def check(experiments: Iterable[Experiment]) -> None:
    """Locate each model, load each text once, and share it out as each federation does.

    Raises:
        AssetError, TaskError: a model or data cannot be used.
    """
    experiments = list(experiments)
    for name in {experiment.model.name for experiment in experiments}:
        locate(name)
    for config in {experiment.task for experiment in experiments}:
        task = load_task(config)
        shares = {(e.federation, e.seed) for e in experiments if e.task == config}
        for federation, seed in shares:
            partition(task.train.labels, federation, seed)
