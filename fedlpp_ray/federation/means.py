"""What an adversary of an experiment may have and be able to do."""

from __future__ import annotations

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.privacy.attacks import feasible, find_attacks
from fedlpp_ray.privacy.view import Means


def means_of(experiment: Experiment) -> frozenset[Means]:
    """What not every adversary has, and this one does."""
    adversary = experiment.adversary
    has: dict[Means, bool] = {
        "architecture": adversary.architecture == "known",
        "auxiliary": adversary.auxiliary is not None,
    }
    return frozenset(mean for mean, there in has.items() if there)


def check_watch(experiment: Experiment) -> None:
    """Refuse to watch attacks that the adversary cannot make.

    Raises:
        ConfigError: naming the first, and what it needs.
    """
    watched = find_attacks(list(experiment.adversary.watch))
    _, left_out = feasible(watched, means_of(experiment))
    for name, reason in left_out.items():
        raise ConfigError(f"adversary.watch '{name}' {reason}")
