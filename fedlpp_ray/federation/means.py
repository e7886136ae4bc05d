"""What an adversary of an experiment may have and be able to do."""

from __future__ import annotations

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy.attacks import Known, feasible, find_attacks
from fedlpp_ray.privacy.view import Means


def means_of(experiment: Experiment) -> frozenset[Means]:
    """What not every adversary has, and this one does."""
    adversary = experiment.adversary
    has: dict[Means, bool] = {
        "architecture": adversary.architecture == "known",
        "auxiliary": adversary.auxiliary is not None,
    }
    return frozenset(mean for mean, there in has.items() if there)


def attacks_of(
    experiment: Experiment, names: list[str] | None = None
) -> tuple[dict[str, Known], dict[str, str]]:
    """The attacks that the adversary can make, and what the others need.

    Args:
        experiment: Says who attacks.
        names: Those that are asked for, of which none is left out; None: all.

    Raises:
        UserError: there is none of a name, or the adversary cannot make it.
    """
    able, left_out = feasible(find_attacks(names), means_of(experiment))
    for name, reason in left_out.items() if names else ():
        raise UserError(f"attack '{name}' {reason}")
    return able, left_out


def check_watch(experiment: Experiment) -> None:
    """Refuse to watch attacks that the adversary cannot make.

    Raises:
        ConfigError: naming the first, and what it needs.
    """
    watched = find_attacks(list(experiment.adversary.watch))
    _, left_out = feasible(watched, means_of(experiment))
    for name, reason in left_out.items():
        raise ConfigError(f"adversary.watch '{name}' {reason}")
