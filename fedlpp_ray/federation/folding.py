"""Memory in which the server receives a round."""

from __future__ import annotations

import math

from torch import nn

from fedlpp_ray.aggregation import Plan, RoundSum
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.wire import Wire
from fedlpp_ray.lora import trainable
from fedlpp_ray.state import Schema, State, schema_of

_MOMENTS = {"fedavg": 0, "fedavgm": 1, "fedadagrad": 1, "fedadam": 2, "fedyogi": 2}


def folding_bytes(model: nn.Module, experiment: Experiment) -> int:
    """Bytes in which the server folds returns as they arrive, in host memory.

    What a `RoundSum` holds: 16 of each number of an update, and of the products that it adds as
    matrices; and 4 of each number that it keeps (`Plan.kept`), for each client, which alone grows
    with the cohort. Beside it, of each number of an update 8 of one as it came and decoded, or
    later of the next state, or 12 of the next state and the direction of a method that has one; 8
    of each product of one return; and of each number of the state 8 of each of the optimizer's
    moments. What the step and the refit of one tensor need is not counted.

    Args:
        model: The server's, or its outline, with its adapter and residuals.
        experiment: What is run.
    """
    state: State = dict(trainable(model))
    config, clients = experiment.server, experiment.federation.updates
    wire = Wire(experiment, schema_of(state))
    update = wire.trained(1)
    sent = {} if experiment.downlink.individual else state
    plan = Plan(wire.method, update, sent, config.rule, config.lr, clients)
    products = plan.summed()
    kinds = ["mean"] * (wire.method.direction is None) + ["products"] * bool(products)
    held = RoundSum(plan).parts(kinds, range(clients)).values()
    stepped = sum(state[name].numel() for name in wire.kept) + residual_numbers(model)
    return (
        sum(dtype.itemsize * math.prod(shape) for dtype, shape in held)
        + (8 if wire.method.direction is None else 12) * _numbers(update)
        + 8 * _numbers(products)
        + 8 * _MOMENTS[config.optimizer] * stepped
    )


def residual_numbers(model: nn.Module) -> int:
    """Of all residuals that a model has."""
    return sum(b.numel() for name, b in model.named_buffers() if name.endswith(".residual"))


def _numbers(schema: Schema) -> int:
    return sum(map(math.prod, schema.values()))
