"""A Ray Tune search over federated runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.search.basic_variant import BasicVariantGenerator

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.runtime.placement import bundles, check_fits
from fedlpp_ray.runtime.space import SearchSpace
from fedlpp_ray.runtime.trial import RESULT, run_trial, trial_resources

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class TrialOutcome:
    """One trial of a sweep.

    Attributes:
        trial: Its id.
        config: Its dotted keys.
        result: The finished run's result, or None.
        error: Why it failed, or None.
    """

    trial: str
    config: dict[str, Any]
    result: dict[str, Any] | None
    error: str | None


def run_sweep(
    space: SearchSpace, storage: str, callbacks: Sequence[Callback]
) -> list[TrialOutcome]:
    """Run the trials, or those that an interrupted sweep of the same name has left.

    Args:
        space: What to search.
        storage: Folder or URI (s3://...) that keeps checkpoints and results.
        callbacks: Told of every report.

    Returns:
        One outcome a trial, in the order of their ids.

    Raises:
        PlacementError: a trial needs what the cluster can never give; nothing has been started.
    """
    for experiment in space.experiments():
        check_fits(bundles(experiment))
    trainable = tune.with_resources(
        partial(run_trial, base=space.base),
        lambda config: trial_resources(_experiment(space, config)),
    )
    folder, mark, query = storage.partition("?")  # s3://bucket/folder?endpoint_override=...
    path = f"{folder.rstrip('/')}/{space.name}{mark}{query}"
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space.param_space,
            tune_config=_tune_config(space),
            run_config=tune.RunConfig(
                name=space.name,
                storage_path=storage,
                verbose=0,
                callbacks=list(callbacks),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            ),
        )
    return sorted(map(_outcome, tuner.fit()), key=lambda outcome: outcome.trial)


def _experiment(space: SearchSpace, config: dict[str, Any]) -> Experiment:
    """A trial's experiment; the base where a searcher chose an invalid one.

    Such a trial is started all the same, to fail on its own with the reason.
    """
    try:
        return space.base.with_values(config)
    except ConfigError:
        return space.base


def _tune_config(space: SearchSpace) -> tune.TuneConfig:
    named = replace(
        space.tune_config,
        reuse_actors=True,
        trial_name_creator=lambda trial: trial.trial_id,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    if space.trials is None:
        return named
    preset = BasicVariantGenerator(points_to_evaluate=list(space.trials))
    return replace(named, search_alg=preset, num_samples=len(space.trials))


def _outcome(outcome: Any) -> TrialOutcome:
    error = str(outcome.error) if outcome.error else None
    result = None
    if outcome.checkpoint and outcome.metrics and "protection" in outcome.metrics:
        with outcome.checkpoint.as_directory() as folder:
            result = json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))
    trial = outcome.metrics.get("trial_id", Path(outcome.path).name)
    return TrialOutcome(trial, outcome.config, result, error)
