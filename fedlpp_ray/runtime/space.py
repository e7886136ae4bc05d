"""A search space: a short Python file that names a base experiment and what to vary.

base = "../configs/trec_minilm.yaml"  # relative to the file
param_space = {"lora.rank": tune.grid_search([4, 16]), ...}  # dotted keys
bundles = {"defence": {"none": {}, "rotate": {"downlink.rotate": "round"}}}  # optional: names that
# stand for several keys or for other keys each; param_space has "defence", with values "none", ...
objectives = {"final/accuracy": "max", ...}  # metric: "max" or "min"
tune_config = tune.TuneConfig(num_samples=4)  # optional: samples, searcher, scheduler; or a
# function of the base experiment that returns it, where it needs the seed or the number of rounds
"""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
)
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from fedlpp_ray.config import ConfigError, Experiment, load_experiment, parse_overrides
from fedlpp_ray.runtime.variants import COLUMNS, TRIAL, Variants, read_bundles, unbundled, without
from fedlpp_ray.tracking.metrics import metric_names

Direction = Literal["max", "min"]
_WITH_METRIC = (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
)
"""Schedulers that compare trials."""


@dataclass(frozen=True)
class SearchSpace:
    """What a sweep searches.

    Attributes:
        name: The file's name and a digest of everything that defines the sweep, so that the same
            sweep is found again in its storage folder and another one is not mixed with it.
        variants: The experiment that trials vary, and what names of bundles stand for.
        param_space: Dotted keys and bundles to Tune samplers, grids or constants.
        objectives: Direction of each metric that counts.
        tune_config: Number of samples, searcher, scheduler.
        trials: Each trial's dotted keys, or None where a searcher chooses as it goes.
        drawn: Experiments of all trials; with a searcher, of as many that are drawn at random.
    """

    name: str
    variants: Variants
    param_space: dict[str, Any]
    objectives: dict[str, Direction]
    tune_config: tune.TuneConfig
    trials: list[dict[str, Any]] | None
    drawn: list[Experiment]

    @property
    def base(self) -> Experiment:
        """The experiment that trials vary."""
        return self.variants.base

    @property
    def keys(self) -> list[str]:
        """The dotted keys and bundles that vary: those that are not constants."""
        return [key for key, value in self.param_space.items() if not _is_constant(value)]

    @property
    def tuner_space(self) -> dict[str, Any]:
        """What Tune is to search: the space for a searcher, or the resolved trials by number."""
        if self.trials is None:
            return self.param_space
        numbers = tune.grid_search(list(range(len(self.trials))))
        picked = {key: tune.sample_from(partial(_pick, self.trials, key)) for key in self.trials[0]}
        return {TRIAL: numbers, **picked}

    @property
    def total(self) -> int:
        """Number of trials."""
        return self.tune_config.num_samples if self.trials is None else len(self.trials)


def load_space(
    path: str | Path, overrides: Iterable[str] = (), max_trials: int | None = None
) -> SearchSpace:
    """Read a search space and resolve its trials, each of which is validated.

    Args:
        path: The Python file.
        overrides: `key=value` on the base. A key or bundle that the space searches is fixed
            instead, and a bundle no longer sets such a key.
        max_trials: Run only the first so many.

    Raises:
        ConfigError: the file lacks a name or has one of a wrong type, a key is unknown, or a trial
            is an invalid experiment; the message names it.
    """
    path = Path(path)
    overrides = list(overrides)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if max_trials is not None and max_trials < 1:
        raise ConfigError(f"--max-trials {max_trials}: must be at least 1")
    module = _try(lambda: runpy.run_path(str(path)), path)
    base_path = path.parent / _get(module, "base", str, path)
    searched = _get(module, "param_space", dict, path)
    bundles = read_bundles(module.get("bundles", {}), searched, path)
    given = parse_overrides(overrides)
    fixed = unbundled(given, bundles)
    base = load_experiment(base_path).with_values(fixed, "command line")
    variants = Variants(base, without(bundles, {*given, *fixed}))
    gone = {*given, *fixed, *(set(bundles) - set(variants.bundles))}
    searched = {key: value for key, value in searched.items() if key not in gone}
    tune_config = module.get("tune_config", tune.TuneConfig())
    if callable(tune_config):
        tune_config = _try(partial(tune_config, base), path)
    if not isinstance(tune_config, tune.TuneConfig):
        raise ConfigError(f"{path}: tune_config must be a ray.tune.TuneConfig")
    _check_values(searched, tune_config, path)
    if all(map(_is_constant, searched.values())):
        raise ConfigError(f"{path}: param_space varies nothing; use tune.grid_search or a sampler")
    trials: list[dict[str, Any]] | None = _resolve(searched, tune_config, base.seed)[:max_trials]
    experiments = [variants.experiment(trial, str(path)) for trial in trials or []] or [base]
    objectives = _objectives(_get(module, "objectives", dict, path), experiments, path)
    _check_metrics(tune_config, experiments, path)
    if taken := {*COLUMNS, *_reported(experiments)} & set(bundles):
        raise ConfigError(f"{path}: bundles: '{min(taken)}' is a column of a sweep's table")
    if tune_config.search_alg is not None:
        samples = min(max_trials or tune_config.num_samples, tune_config.num_samples)
        trials, tune_config = None, replace(tune_config, num_samples=samples)
    parts = [path.read_text(), base.model_dump_json(), *overrides, str(max_trials)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    name = f"{path.stem}-{digest}"
    return SearchSpace(name, variants, searched, objectives, tune_config, trials, experiments)


def _try(action: Callable[[], Any], path: Path) -> Any:
    try:
        return action()
    except Exception as error:
        if "optuna" in str(error).lower() and find_spec("optuna") is None:
            raise ConfigError(f"{path} needs: pip install 'fedlpp_ray[search]'") from error
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error


def _get(module: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    if not isinstance(module.get(name), kind):
        raise ConfigError(f"{path}: must define '{name}', a {kind.__name__}")
    return module[name]


def _objectives(
    objectives: dict[str, Any], experiments: Sequence[Experiment], path: Path
) -> dict[str, Direction]:
    if not objectives:
        allowed = ", ".join(_reported(experiments))
        raise ConfigError(f"{path}: objectives: name at least one; allowed: {allowed}")
    for metric, direction in objectives.items():
        _check_reported(metric, experiments, f"{path}: objectives")
        if direction not in ("max", "min"):
            raise ConfigError(f"{path}: objectives: {metric}: allowed: 'max', 'min'")
    return objectives


def _check_metrics(
    tune_config: tune.TuneConfig, experiments: Sequence[Experiment], path: Path
) -> None:
    """Refuse a searcher or a scheduler that waits for what no trial reports, which is no error."""
    for name, user in (
        ("", tune_config),
        (".search_alg", tune_config.search_alg),
        (".scheduler", tune_config.scheduler),
    ):
        metrics = getattr(user, "metric", None) or []
        for metric in [metrics] if isinstance(metrics, str) else metrics:
            _check_reported(metric, experiments, f"{path}: tune_config{name}")


def _check_reported(metric: str, experiments: Sequence[Experiment], where: str) -> None:
    if metric not in (known := _reported(experiments)):
        raise ConfigError(f"{where}: no trial reports '{metric}'; allowed: {', '.join(known)}")


def _reported(experiments: Sequence[Experiment]) -> list[str]:
    return list(dict.fromkeys(name for e in experiments for name in metric_names(e)))


def _check_values(searched: dict[str, Any], tune_config: tune.TuneConfig, path: Path) -> None:
    for key, value in searched.items():
        if isinstance(value, dict) and set(value) != {"grid_search"}:
            raise ConfigError(f"{path}: {key}: is a section; give its keys, e.g. '{key}.x': ...")
    if tune_config.num_samples < 1:
        raise ConfigError(f"{path}: num_samples = {tune_config.num_samples}: must be at least 1")
    if tune_config.search_alg is not None:
        _check_searcher(searched, tune_config, path)
    if isinstance(tune_config.scheduler, _WITH_METRIC):
        _check_has_metric(tune_config, tune_config.scheduler, f"{path}: tune_config.scheduler")


def _check_searcher(searched: dict[str, Any], tune_config: tune.TuneConfig, path: Path) -> None:
    """Refuse what Tune would refuse when the cluster is up, or would not count as we do."""
    searcher, where = tune_config.search_alg, f"{path}: tune_config.search_alg"
    if not isinstance(searcher, Searcher):
        raise ConfigError(
            f"{where}: must be a ray.tune.search.Searcher, as OptunaSearch is; leave it out for "
            "grids and samplers, which max_concurrent_trials limits, too"
        )
    for key, value in searched.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{path}: {key}: a searcher chooses and has no grid; allowed: tune.choice"
            )
    _check_has_metric(tune_config, searcher, where)
    inner = getattr(searcher, "searcher", searcher)  # of a ConcurrencyLimiter
    if convert := getattr(inner, "convert_search_space", None):
        _try(partial(convert, searched), path)


def _check_has_metric(tune_config: tune.TuneConfig, user: Any, where: str) -> None:
    if user.metric is None and tune_config.metric is None:
        raise ConfigError(f"{where}: needs a metric and a mode")


def _pick(trials: list[dict[str, Any]], key: str, spec: Any) -> Any:
    return trials[spec.config.trial][key]  # by attribute, or Tune asks before it has the number


def _is_constant(value: Any) -> bool:
    return not isinstance(value, dict | Domain)


def _resolve(
    searched: dict[str, Any], tune_config: tune.TuneConfig, seed: int
) -> list[dict[str, Any]]:
    random = np.random.RandomState(seed % 2**32)
    return [
        {key: spec["config"][key] for key in searched}
        for _ in range(tune_config.num_samples)
        for _, spec in generate_variants({"config": searched}, random_state=random)
    ]
