"""What an adversary of an experiment may have and be able to do."""

from __future__ import annotations

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.aggregation.methods.base import keep
from fedlpp_ray.config import FULL_PRECISION, ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy.attacks import Known, feasible, find_attacks
from fedlpp_ray.privacy.view import Means


def means_of(experiment: Experiment) -> frozenset[Means]:
    """What not every adversary has, and this one does."""
    adversary, down = experiment.adversary, experiment.downlink
    has: dict[Means, bool] = {
        "architecture": adversary.architecture == "known",
        "auxiliary": adversary.auxiliary is not None,
        "masks": bool(down.server_mask or down.client_mask or experiment.lora.client_ranks),
        "average": experiment.server.final_average > 1,
        "returns": _follows_from_returns(experiment),
    }
    return frozenset(mean for mean, there in has.items() if there)


def _follows_from_returns(experiment: Experiment) -> bool:
    """Whether the server's next state is its last one and lr times a mean of what clients return.

    And of what they train to, from one broadcast that all of them share: not of codes, nor of what
    is clipped, turned, masked or corrected.
    """
    server, down, client = experiment.server, experiment.downlink, experiment.client
    method = find_method(server.aggregation)
    return (
        method.averages
        and method.refit is keep
        and (server.rule, server.optimizer, server.robust) == ("residual", "fedavg", "none")
        and not (server.tune_steps or experiment.dp.clip or client.scaffold)
        and not (down.individual or down.rotate != "none" or down.server_mask or down.every > 1)
        and experiment.uplink.bits == FULL_PRECISION
        and experiment.federation.mode == "synchronous"
        and not experiment.lora.client_ranks
    )


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
