"""What can be checked of experiments before any compute is spent on them."""

from __future__ import annotations

from collections.abc import Iterable

from fedlpp_ray.config import Experiment
from fedlpp_ray.lora import add_lora
from fedlpp_ray.models import check_base, check_text, load_outline, load_tokenizer
from fedlpp_ray.tasks import load_task, partition


def check(experiments: Iterable[Experiment]) -> None:
    """Load each text once and share it out as each federation does; fit bases and adapters.

    The models are built without weights.

    Raises:
        AssetError, TaskError: a model, its tokenizer or data cannot be used.
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
            pad = load_tokenizer(model).pad_token_id
            check_text(outline, model, pad, config.max_length)
            check_base(outline, client)
            add_lora(outline, lora, seed=0)
