"""What can be checked of experiments before any compute is spent on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fedlpp_ray.config import Experiment, FederationConfig, Section, TaskConfig
from fedlpp_ray.federation.attacked import check_at_end
from fedlpp_ray.federation.combinations import check_combinations
from fedlpp_ray.federation.secure import grid_of
from fedlpp_ray.federation.spread import check_spread
from fedlpp_ray.lora import add_adapter
from fedlpp_ray.models import (
    check_base,
    check_text,
    check_zero,
    load_outline,
    load_tokenizer,
    make_emulator,
    trained_modules,
)
from fedlpp_ray.tasks import (
    Examples,
    Prompts,
    Task,
    TaskError,
    Wording,
    check_text_metrics,
    load_auxiliary,
    load_task,
    share_out,
)

logger = logging.getLogger(__name__)


def check(experiments: Iterable[Experiment]) -> None:
    """Load each text once and share it out as each federation does; fit bases and adapters.

    The models are built without weights. How many examples no client has is logged.

    Raises:
        AssetError, TaskError: a model, its tokenizer, data, or the auxiliary text of attacks at the
            end cannot be used.
        BaseFormatError, LoraError, LayersError: a client base, an emulator or an adapter does not
            fit its model.
        ConfigError: keys do not go together, or the sums of `secure` would overflow.
    """
    experiments = list(experiments)
    for experiment in experiments:
        check_combinations(experiment)
        check_at_end(experiment)
        check_spread(experiment)
        check_zero(experiment.server.zero, "server.zero")
        check_zero(experiment.client.zero, "client.zero")
    for config in {experiment.task for experiment in experiments}:
        task = load_task(config)
        users = [experiment for experiment in experiments if experiment.task == config]
        left_out = set()
        for federation, seed, own in {_of_shares(user) for user in users}:
            _, train, shares = share_out(task.train, federation, seed, own)
            for user in users:
                if _of_shares(user) == (federation, seed, own) and user.secure.threshold:
                    grid_of(user, shares.sizes.tolist())
            left_out.add((federation.clients, shares.left_out, len(train)))
        for named in {user.adversary.auxiliary for user in users if user.adversary.at_end} - {None}:
            _check_auxiliary(config, str(named), task)
        for clients, examples, total in sorted(left_out):
            if examples:
                logger.warning(
                    "%d of %d training examples are left out: they belong to none of the %d "
                    "largest keys (federation.clients)",
                    *(examples, total, clients),
                )
        classes = len(task.labels) if config.kind == "classification" else None
        for user in {_of_model(user): user for user in users}.values():
            _check_model(user, classes)


def _check_auxiliary(config: TaskConfig, named: str, task: Task) -> None:
    """Refuse text for attacks at the end of a run that would leave them none."""
    if set(_texts(load_auxiliary(config, named))) <= set(_texts(task.held_out)):
        raise TaskError(f"adversary.auxiliary: each text of '{named}' is held out")


def _texts(found: Examples | Prompts) -> Iterable[tuple[str, ...]]:
    if isinstance(found, Prompts):
        return zip(found.prompts)
    return zip(found.texts, found.pairs, strict=True) if found.pairs else zip(found.texts)


def _of_shares(experiment: Experiment) -> tuple[FederationConfig, int, int]:
    """What decides which examples are whose."""
    return experiment.federation, experiment.seed, experiment.server.examples


def _of_model(experiment: Experiment) -> tuple[Section, ...]:
    """What decides whether a model fits."""
    return (
        experiment.model,
        experiment.client,
        experiment.adapter,
        experiment.lora,
        experiment.emulator,
        experiment.generation,
    )


def _check_model(experiment: Experiment, classes: int | None) -> None:
    """Refuse a model that the text, its base or its adapter does not fit."""
    model, length = experiment.model, experiment.task.max_length
    tokenizer = load_tokenizer(model)
    outline = load_outline(model, classes)
    if classes is None:
        if experiment.generation.examples != 0:
            check_text_metrics()
        Wording(tokenizer, experiment.generation, length)
        length += experiment.generation.max_new_tokens
    adapter, lora, emulator = experiment.adapter, experiment.lora, experiment.emulator
    tokens = adapter.tokens if adapter.kind == "prompt" else 0
    check_text(outline, model, tokenizer.pad_token_id, length, tokens)
    bases = [outline]
    if emulator.kind != "none":
        bases.append(make_emulator(load_outline(model, classes), emulator, adapter.outer))
    for base in bases:  # the server's, and what clients have in its place
        trained = trained_modules(base, adapter)
        check_base(base, experiment.client, [*lora.modules_to_save, *trained])
        add_adapter(base, adapter, lora, seed=0)
