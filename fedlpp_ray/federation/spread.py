"""What a party of several ranks can do, and what its server's own training needs."""

from __future__ import annotations

from fedlpp_ray.aggregation import Method, find_method
from fedlpp_ray.config import FULL_PRECISION, ConfigError, Experiment


def check_spread(experiment: Experiment) -> None:
    """Refuse keys of `server` and `client` that do not go together with ranks or ZeRO.

    Raises:
        ConfigError: naming them, and why.
    """
    _check_devices(experiment)
    if experiment.method == "federated":
        method = find_method(experiment.server.aggregation)
        _check_tuning(experiment, method)
        _check_server(experiment, method)
        _check_client(experiment, method)
        return
    server, client = experiment.server, experiment.client
    if experiment.method == "local-only" and (server.num_workers > 1 or server.zero.stage):
        raise ConfigError(
            f"server.num_workers = {server.num_workers}, server.zero.stage = {server.zero.stage}: "
            "method 'local-only' has no server, only one client in one process; allowed: 1, 0"
        )
    if server.zero.stage == 3 and client.compute == "bf16":
        raise ConfigError(
            "server.zero.stage 3: client.compute 'bf16' stores the base in another format than it "
            "is cut in; allowed with method 'centralised': fp32"
        )
    if server.zero.stage == 3 and (
        experiment.emulator.kind != "none"
        or (client.base_format == "bitsandbytes" and client.base_bits != FULL_PRECISION)
    ):
        raise ConfigError(
            "server.zero.stage 3 with method 'centralised': the floor is measured on a client's "
            "base, and an emulator or one of bitsandbytes is made of the whole model; allowed: "
            "emulator.kind 'none' with client.base_format 'packed'"
        )
    if client.num_workers > 1 or client.zero.stage:
        raise ConfigError(
            f"client.num_workers and client.zero: method '{experiment.method}' has no client "
            "actors; what it trains is spread by server.num_workers and server.zero"
        )


def _check_devices(experiment: Experiment) -> None:
    runtime = experiment.runtime
    for name, ranks, share in (
        ("server", experiment.server.num_workers, runtime.server_gpus),
        ("client", experiment.client.num_workers, runtime.client_gpus),
    ):
        if ranks > 1 and 0 < share < 1:
            raise ConfigError(
                f"{name}.num_workers = {ranks} with runtime.{name}_gpus = {share:g}: "
                "NCCL takes no two ranks on one GPU; allowed: 0, 1"
            )


def _check_tuning(experiment: Experiment, method: Method) -> None:
    steps = experiment.server.tune_steps
    if not steps:
        return
    if not experiment.server.examples:
        raise ConfigError(
            f"server.tune_steps = {steps} needs server.examples above 0: the server trains on "
            "examples of its own, not on its clients'"
        )
    if method.personal:
        raise ConfigError(
            f"server.tune_steps = {steps}: server.aggregation '{experiment.server.aggregation}' "
            f"leaves {' and '.join(sorted(method.personal))} at the clients, so the server has no "
            "whole model to train"
        )


def _check_server(experiment: Experiment, method: Method) -> None:
    if experiment.server.zero.stage != 3:
        return
    if method.writes_base:
        raise ConfigError(
            f"server.zero.stage 3: server.aggregation '{experiment.server.aggregation}' writes a "
            "tensor of each adapted layer's size into the base, which every rank would have whole"
        )
    client = experiment.client
    if client.base_format == "bitsandbytes" and client.base_bits != FULL_PRECISION:
        raise ConfigError(
            "server.zero.stage 3 sends clients their base layer by layer in the format 'packed'; "
            "client.base_format 'bitsandbytes' is made from a checkpoint"
        )


def _check_client(experiment: Experiment, method: Method) -> None:
    client, least = experiment.client, experiment.runtime.min_client_actors
    if client.num_workers > 1 and least is not None:
        raise ConfigError(
            f"client.num_workers = {client.num_workers} with runtime.min_client_actors = {least}: "
            "actors that join later get their ranks one by one, and could wait for each other's; "
            "set runtime.min_client_actors to null"
        )
    if client.zero.stage == 2:
        raise ConfigError(
            "client.zero.stage 2 spreads the gradient, which a client's rules correct as a whole; "
            "allowed: 0, 3"
        )
    if not client.zero.stage:
        return
    reasons = {
        "client.base_format 'bitsandbytes' has tensors that cannot be cut; allowed: packed": (
            client.base_format == "bitsandbytes" and client.base_bits != FULL_PRECISION
        ),
        "client.compute 'bf16' stores the base in another format than it is cut in; allowed: "
        "fp32": client.compute == "bf16",
        "server.send_residual gives every rank a tensor of each adapted layer's size": (
            method.writes_base and experiment.server.send_residual
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"client.zero.stage 3: {reason}")
