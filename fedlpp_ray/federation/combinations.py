"""Which adapters, emulators and aggregation methods go together; no model is needed to say so."""

from __future__ import annotations

from collections.abc import Mapping

from fedlpp_ray.aggregation import METHODS, Method, find_method, find_robust
from fedlpp_ray.aggregation.methods.base import keep
from fedlpp_ray.config import FULL_PRECISION, ConfigError, Experiment
from fedlpp_ray.federation import guarded, secure
from fedlpp_ray.federation.means import check_watch
from fedlpp_ray.federation.private import refusals
from fedlpp_ray.privacy.dp import check_accountant
from fedlpp_ray.privacy.secure import check_installed


def check_combinations(experiment: Experiment) -> None:
    """Refuse keys that do not go together.

    Raises:
        ConfigError: naming them, and why.
        UserError: `dp.clip` without its accountant, or `secure.threshold` without its library.
    """
    _check_privacy(experiment)
    check_watch(experiment)
    for key, reasons in guarded.refusals(experiment.downlink).items():
        _refuse(key, reasons)
    _check_emulator(experiment)
    _check_adapter(experiment)
    _check_method(experiment)


def _check_privacy(experiment: Experiment) -> None:
    """Refuse what differential privacy or secure aggregation do not go with, and what they lack."""
    if experiment.dp.clip is not None:
        method = find_method(experiment.server.aggregation)
        _refuse("dp.clip", refusals(experiment, method))
        check_accountant()
    if experiment.secure.threshold is not None:
        method = find_method(experiment.server.aggregation)
        _refuse(
            f"secure.threshold = {experiment.secure.threshold}",
            secure.refusals(experiment, method),
        )
        check_installed()


def _check_adapter(experiment: Experiment) -> None:
    """Refuse what only LoRA's factors can do, with another adapter."""
    kind, name = experiment.adapter.kind, experiment.server.aggregation
    if kind == "lora":
        return
    method = find_method(name)
    rounds = range(1, experiment.federation.rounds + 1)
    always = all("adapter" in method.trained(round) for round in rounds)
    whole = method.refit is keep and "adapter" in method.travels and not method.mixed_ranks
    if not (always and whole):
        raise ConfigError(
            f"server.aggregation '{name}' is made of LoRA's factors, and adapter.kind '{kind}' has "
            "none; allowed: fedit, which averages any tensor"
        )
    reasons = {
        "lora.modules_to_save is trained beside A and B": bool(experiment.lora.modules_to_save),
        "lora.client_ranks gives clients ranks": bool(experiment.lora.client_ranks),
        "downlink.rotate turns A and B": experiment.downlink.rotate != "none",
        "downlink.server_mask and client_mask hide columns of A": bool(
            experiment.downlink.server_mask or experiment.downlink.client_mask
        ),
        f"downlink.factors '{experiment.downlink.factors}' quantizes one of A and B": (
            experiment.downlink.factors != "both"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{reason}, and adapter.kind '{kind}' has none")


def _check_emulator(experiment: Experiment) -> None:
    """Refuse an emulator that cannot be made, or whose adapter the model could not take."""
    config, adapter = experiment.emulator, experiment.adapter.kind
    if config.kind == "none":
        if config.steps:
            raise ConfigError(
                f"emulator.steps = {config.steps}: emulator.kind 'none' has nothing to distil; "
                "allowed: shared-layer, layer-drop"
            )
        return
    if config.steps and not experiment.server.examples:
        raise ConfigError(
            f"emulator.steps = {config.steps} needs server.examples above 0: the server distils on "
            "texts of its own, not on its clients'"
        )
    reasons = {
        ("shared-layer", "layers"): "the first and last layers are the one that all share; "
        "allowed: lora, prompt",
        ("layer-drop", "lora"): "dropped layers have no A and B, and the server's have; "
        "allowed: prompt, layers",
    }
    if reason := reasons.get((config.kind, adapter)):
        raise ConfigError(f"adapter.kind '{adapter}' with emulator.kind '{config.kind}': {reason}")


def _check_method(experiment: Experiment) -> None:
    """Refuse what the method, or the aggregation method, cannot do."""
    name, method = experiment.server.aggregation, find_method(experiment.server.aggregation)
    if experiment.method != "federated":
        if experiment.lora.client_ranks:
            raise ConfigError(
                f"lora.client_ranks: method '{experiment.method}' trains one model; set it to null"
            )
        return
    ranks = set(experiment.lora.client_ranks or [experiment.lora.rank])
    if ranks != {experiment.lora.rank} and not method.mixed_ranks:
        able = ", ".join(key for key, known in METHODS.items() if known.mixed_ranks)
        raise ConfigError(
            f"lora.client_ranks: server.aggregation '{name}' adds A and B of one rank; methods "
            f"for several: {able}"
        )
    if method.personal and experiment.evaluation.server:
        parts = " and ".join(sorted(method.personal))
        raise ConfigError(
            f"server.aggregation '{name}' leaves {parts} at the clients, so the server has no "
            "model to evaluate: set evaluation.server=false"
        )
    if experiment.server.send_residual and not method.writes_base:
        able = ", ".join(key for key, known in METHODS.items() if known.writes_base)
        raise ConfigError(
            f"server.send_residual: server.aggregation '{name}' writes nothing into the base; "
            f"methods that do: {able}"
        )
    _check_variates(experiment, method)
    _check_stale(experiment, method)
    _check_masks(experiment, method)
    _check_individual(experiment, method)
    _check_robust(experiment, method)
    _check_final(experiment, method)
    _check_correction(experiment, method)
    if experiment.downlink.rotate != "none" and experiment.uplink.error_feedback:
        raise ConfigError(
            "uplink.error_feedback adds what an earlier round's rounding took, and downlink.rotate "
            "turns every round another way: use one of them"
        )
    if experiment.downlink.rotate != "none" and not {"A", "B"} <= method.travels:
        raise ConfigError(
            f"downlink.rotate turns A and B together, and with server.aggregation '{name}' only "
            f"{' and '.join(sorted(method.travels - {'head'}))} travels"
        )
    if method.refit is not keep and experiment.server.optimizer != "fedavg":
        raise ConfigError(
            f"server.optimizer '{experiment.server.optimizer}' steps along factors, and "
            f"server.aggregation '{name}' goes on from the mean of products; allowed: fedavg"
        )


def _check_variates(experiment: Experiment, method: Method) -> None:
    """Refuse what would make SCAFFOLD's variates other than mean gradients."""
    if not experiment.client.scaffold:
        return
    reasons = {
        f"server.aggregation '{experiment.server.aggregation}' does not average the updates of all "
        "that is trained": method.refit is not keep or not method.averages or bool(method.personal),
        "lora.client_ranks gives clients other tensors than the server": bool(
            experiment.lora.client_ranks
        ),
        "downlink.rotate turns every round another way": experiment.downlink.rotate != "none",
        "federation.local_epochs makes clients go different numbers of steps": bool(
            experiment.federation.local_epochs
        ),
        "federation.sampling 'examples' weights clients twice": experiment.federation.sampling
        != "uniform",
        "downlink.every above 1 leaves the server's variate as it was while the clients renew "
        "theirs, so that their difference is no drift": experiment.downlink.every > 1,
        "downlink.server_mask and downlink.client_mask give clients other tensors than the "
        "server": _masks(experiment),
        "downlink.perturbation has every client start elsewhere, and the difference of variates "
        "would be that of the places": bool(experiment.downlink.perturbation),
    }
    _refuse("client.scaffold", reasons)


def _check_stale(experiment: Experiment, method: Method) -> None:
    """Refuse what an update relative to an earlier broadcast would make wrong."""
    name, every = experiment.server.aggregation, experiment.downlink.every
    rounds, made = range(1, experiment.federation.rounds + 1), experiment.downlink.made_in
    buffered = experiment.federation.mode == "fedbuff"
    if every == 1 and not buffered:
        return
    reasons = {
        f"server.rule '{experiment.server.rule}' goes back to the broadcast, and with it to before "
        "the rounds since; allowed: residual": experiment.server.rule != "residual",
        f"server.aggregation '{name}' does not take the mean of the updates, and what else it "
        "reads off a broadcast would count again in every round that it is in force": (
            not method.averages
        ),
        f"server.aggregation '{name}' trains other parts from round to round, each given what the "
        "round before made of the others, which a broadcast in force for longer does not have": (
            any(
                method.trained(round) != method.trained(1 if buffered else made(round))
                for round in rounds
            )
        ),
    }
    if buffered:
        reasons |= {
            "downlink.every above 1 leaves the last broadcast in force, and a client starts from "
            "the newest state": every > 1,
            f"{experiment.downlink.individual} gives every client a message of its own": bool(
                experiment.downlink.individual
            ),
            "client.scaffold moves the server's variate by a cohort that started together": (
                experiment.client.scaffold
            ),
            "federation.sampling 'examples' is of whole cohorts": experiment.federation.sampling
            != "uniform",
        }
    _refuse("federation.mode 'fedbuff'" if buffered else f"downlink.every = {every}", reasons)


def _check_masks(experiment: Experiment, method: Method) -> None:
    """Refuse what cannot be done with the columns that a client has."""
    if not _masks(experiment):
        return
    name = experiment.server.aggregation
    reasons = {
        f"server.rule '{experiment.server.rule}' draws the server's model to the broadcast, where "
        "masked columns are zero; allowed: residual": experiment.server.rule != "residual",
        f"server.aggregation '{name}' does not average the updates of factors, which alone are "
        "unbiased under masks": method.refit is not keep or not method.averages,
        f"server.aggregation '{name}' does not send A, whose columns are masked": "A"
        not in method.travels,
        "uplink.error_feedback adds what an earlier round's rounding took, and "
        "downlink.client_mask leaves a client other columns in every round": bool(
            experiment.downlink.client_mask and experiment.uplink.error_feedback
        ),
    }
    _refuse("downlink.server_mask, downlink.client_mask", reasons)


def _check_individual(experiment: Experiment, method: Method) -> None:
    """Refuse what needs one broadcast for all, where each client has a message of its own."""
    key, federation = experiment.downlink.individual, experiment.federation
    if not key:
        return
    name, rule = experiment.server.aggregation, experiment.server.rule
    reasons = {
        f"server.rule '{rule}' goes to the broadcast, and each client has another; allowed: "
        "residual": rule != "residual",
        f"server.aggregation '{name}' does not average the updates of factors, and what else it "
        "reads is a broadcast that all share": method.refit is not keep or not method.averages,
    }
    _refuse(key, reasons)
    if experiment.downlink.perturbation:
        reasons = {
            f"federation.sample_size = {federation.sample_size}: the noise of one client cancels "
            "with nobody's; allowed: 2 and more": federation.sample_size < 2,
            "downlink.client_mask leaves each client other columns, and what is to cancel does "
            "not arrive": bool(experiment.downlink.client_mask),
        }
        _refuse(f"downlink.perturbation = {experiment.downlink.perturbation:g}", reasons)


def _check_robust(experiment: Experiment, method: Method) -> None:
    """Refuse what a robust rule would make wrong, or where it could promise nothing."""
    config, federation = experiment.server, experiment.federation
    if config.robust == "none":
        if config.byzantine:
            raise ConfigError(
                f"server.byzantine = {config.byzantine}: server.robust 'none' tolerates no attacker"
            )
        return
    rule, ranks = find_robust(config.robust), set(experiment.lora.client_ranks or ())
    needed = rule.fewest(config.byzantine)
    limit = f"{needed} updates, 2 server.byzantine + {rule.spare}"
    reasons = {
        "server.weighting 'examples' would have a client's vote grow with the number of examples "
        "that it says it has, and these rules are unweighted; allowed: uniform": (
            config.weighting == "examples"
        ),
        f"server.aggregation '{config.aggregation}' does not take the mean of the updates, in "
        "whose place the rule comes": method.refit is not keep or not method.averages,
        "client.scaffold moves the server's variate by the mean of all updates": (
            experiment.client.scaffold
        ),
        "downlink.client_mask has every client train other columns, and what it does not train "
        "is zero: no vote": bool(experiment.downlink.client_mask),
        "lora.client_ranks gives clients other rows, and what one lacks is zero: no vote": (
            bool(ranks - {experiment.lora.rank})
        ),
        "server.byzantine = 0 leaves nothing out, so that one attacker is enough; allowed: 1 or "
        "more": rule.trims and not config.byzantine,
        f"a round of {federation.updates} updates is too small: it needs {limit}": (
            federation.updates < needed
        ),
        f"federation.min_updates = {federation.min_updates} lets a round be closed that is too "
        f"small: it needs {limit}": federation.min_updates < needed,
    }
    _refuse(f"server.robust '{config.robust}'", reasons)


def _check_final(experiment: Experiment, method: Method) -> None:
    """Refuse a final model that cannot be made, or would be another than it is said to be."""
    config, rounds = experiment.server, experiment.federation.rounds
    name, average = config.aggregation, config.final_average
    personal = (
        f"server.aggregation '{name}' leaves {' and '.join(sorted(method.personal))} at the "
        "clients, so the server has no whole model"
    )
    if average > 1:
        reasons = {
            f"there are federation.rounds = {rounds}; allowed: 0 to {rounds}": average > rounds,
            personal: bool(method.personal),
            f"server.aggregation '{name}' makes new factors of products in every round, whose mean "
            "is not that of the factors; allowed: methods that average factors, such as fedit": (
                method.refit is not keep
            ),
        }
        _refuse(f"server.final_average = {average}", reasons)
    if config.final_tune_steps:
        reasons = {
            "needs server.examples above 0: the server trains on examples of its own, not on its "
            "clients'": not config.examples,
            personal: bool(method.personal),
        }
        _refuse(f"server.final_tune_steps = {config.final_tune_steps}", reasons)


def _check_correction(experiment: Experiment, method: Method) -> None:
    """Refuse a correction of the server's base towards one that it cannot be made of."""
    rank, client, kind = experiment.server.base_correction, experiment.client, experiment.emulator
    if not rank:
        return
    reasons = {
        "client.base_bits 32 takes nothing from W0 that could be corrected; allowed: 2 to 8": (
            client.base_bits == FULL_PRECISION
        ),
        f"emulator.kind '{kind.kind}' gives clients another model than W0": kind.kind != "none",
        "client.base_format 'bitsandbytes' computes on weights that it alone can read; allowed: "
        "packed": client.base_format == "bitsandbytes",
        "server.zero.stage 3 spreads W0 over ranks, and the correction is made of whole layers; "
        "allowed: 0, 2": experiment.server.zero.stage == 3,
        f"server.aggregation '{experiment.server.aggregation}' leaves a part of the model at the "
        "clients, so the server has none to correct": bool(method.personal),
    }
    _refuse(f"server.base_correction = {rank}", reasons)


def _masks(experiment: Experiment) -> bool:
    return bool(experiment.downlink.server_mask or experiment.downlink.client_mask)


def _refuse(key: str, reasons: Mapping[str, bool]) -> None:
    """Refuse a key for the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{key}: {reason}")
