"""A Ray Tune search over federated runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune import Callback
from ray.tune.result import DONE

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.runtime.callbacks import PlacementCallback
from fedlpp_ray.runtime.placement import bundles, check_fits, in_words
from fedlpp_ray.runtime.searcher import OfFinished
from fedlpp_ray.runtime.shared_folder import check_shared
from fedlpp_ray.runtime.space import SearchSpace
from fedlpp_ray.runtime.trial import run_trial, trial_resources
from fedlpp_ray.runtime.variants import values_of
from fedlpp_ray.tracking.metrics import PROTECTION, THREAT, reported

KEPT_CHECKPOINTS = 2
RESTARTS = 2
"""How often a trial that lost a process goes on from its last checkpoint before it has failed."""
_LENIENT = "TUNE_DISABLE_STRICT_METRIC_CHECKING"
"""Or Tune ends a sweep at a report without the metric of a searcher or a scheduler: protection is
measured in the last round alone, accuracy in every `evaluation.every`-th. `load_space` has refused
a metric that no trial reports."""


@dataclass(frozen=True)
class TrialOutcome:
    """One trial of a sweep.

    Attributes:
        trial: Its id.
        config: Its dotted keys and choices of bundles.
        metrics: What it reported last; `protection` is among them if its run is finished.
        error: Why it failed, or None.
        threat: Against whom its protection is, in words; None of one that is not finished.
        ended: Whether it has ended, by itself or by a scheduler.
    """

    trial: str
    config: dict[str, Any]
    metrics: dict[str, float]
    error: str | None
    threat: str | None = None
    ended: bool = False

    @property
    def status(self) -> Literal["finished", "stopped", "unfinished", "failed"]:
        """How it ended: "stopped" by a scheduler; "unfinished" has not, for the sweep has ended."""
        if self.error:
            return "failed"
        if PROTECTION in self.metrics:
            return "finished"
        return "stopped" if self.ended else "unfinished"


def run_sweep(
    space: SearchSpace, storage: str, callbacks: Sequence[Callback]
) -> list[TrialOutcome]:
    """Run the trials, or those that an interrupted sweep of the same name has left.

    Args:
        space: What to search.
        storage: Folder or URI (s3://...) that keeps checkpoints and results.
        callbacks: Told of every report.

    Returns:
        One outcome a trial that has reported or failed, in the order of their ids.

    Raises:
        PlacementError: a trial needs what the cluster can never give; nothing has been started.
        StorageError: the nodes do not share `storage`; nothing has been started.
    """
    check_shared(storage)
    os.environ[_LENIENT] = "1"
    for experiment in space.drawn:
        check_fits(bundles(experiment), experiment.server.num_workers)
    trainable = tune.with_resources(
        partial(run_trial, variants=space.variants),
        lambda config: trial_resources(_experiment(space, config)),
    )
    folder, mark, query = storage.partition("?")  # s3://bucket/folder?endpoint_override=...
    path = f"{folder.rstrip('/')}/{space.name}{mark}{query}"
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space.tuner_space,
            tune_config=_tune_config(space),
            run_config=tune.RunConfig(
                name=space.name,
                storage_path=storage,
                verbose=0,
                callbacks=[*callbacks, _watch(space.base)],
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            ),
        )
    return outcomes_of(tuner.fit())


def _watch(base: Experiment) -> PlacementCallback:
    needed = " and ".join(in_words(bundle) for bundle in bundles(base))
    return PlacementCallback(base.runtime.start_timeout, needed)


def _experiment(space: SearchSpace, config: dict[str, Any]) -> Experiment:
    """A trial's experiment; the base where a searcher chose an invalid one.

    Such a trial is started all the same, to fail on its own with the reason.
    """
    try:
        return space.variants.experiment(config)
    except ConfigError:
        return space.base


def _tune_config(space: SearchSpace) -> tune.TuneConfig:
    samples = space.tune_config.num_samples if space.trials is None else 1
    searcher = space.tune_config.search_alg if space.trials is None else None
    return replace(
        space.tune_config,
        num_samples=samples,
        search_alg=OfFinished(searcher) if searcher else None,
        reuse_actors=True,
        trial_name_creator=lambda trial: trial.trial_id,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def outcomes_of(results: Iterable[Any]) -> list[TrialOutcome]:
    """Of each of Tune's results, by trial; of one that has not come to a first report, none.

    There are such where the sweep was interrupted.
    """
    found = [_outcome(each) for each in results if each.config is not None or each.error]
    return sorted(found, key=lambda outcome: outcome.trial)


def _outcome(outcome: Any) -> TrialOutcome:
    error = str(outcome.error) if outcome.error else None
    metrics = outcome.metrics or {}
    trial = metrics.get("trial_id", Path(outcome.path).name)
    config, threat = values_of(outcome.config or {}), metrics.get(THREAT)
    ended = bool(metrics.get(DONE))
    return TrialOutcome(trial, config, reported(metrics), error, threat, ended)
