"""What can be checked of experiments before any compute is spent on them."""

from __future__ import annotations

from collections.abc import Iterable

from fedlpp_ray.config import Experiment
from fedlpp_ray.lora import add_lora
from fedlpp_ray.models import check_base, load_outline
from fedlpp_ray.tasks import load_task, partition


def check(experiments: Iterable[Experiment]) -> None:
    """Load each text once and share it out as each federation does; fit bases and adapters.

    The models are built without weights.

    Raises:
        AssetError, TaskError: a model or data cannot be used.
        BaseFormatError, LoraError: a client base or an adapter does not fit its model.
    """
    experiments = list(experiments)
    for config in {experiment.task for experiment in experiments}:
        task = load_task(config)
        users = [experiment for experiment in experiments if experiment.task == config]
        for federation, seed in {(user.federation, user.seed) for user in users}:
            partition(task.train.labels, federation, seed)
        for model, client, lora in {(user.model, user.client, user.lora) for user in users}:
            outline = load_outline(model, len(task.labels))
            check_base(outline, client)
            add_lora(outline, lora, seed=0)
