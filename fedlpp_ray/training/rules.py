"""What a client does beside plain AdamW: its optimiser, its learning rates, its gradient's rule.

Anchors of a client are what it received, the broadcast D (x in the papers), never the server's S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fedlpp_ray.config import ClientConfig, Experiment
from fedlpp_ray.state import State

Schedule = Literal["constant", "linear", "cosine"]
Parameters = Mapping[str, nn.Parameter]
"""Trainable parameters under the names of a `State`."""


def schedule_factor(schedule: Schedule, step: int, steps: int, warmup: int = 0) -> float:
    """What the learning rate is multiplied by in step `step` of 0 .. `steps` - 1.

    It rises from 0 through `warmup` steps, then stays at 1, or falls to 0 at `steps`, as
    transformers' `get_{constant,linear,cosine}_schedule_with_warmup` have it. Over rounds, it is
    `schedule_factor(schedule, round - 1, rounds)`: 1 in the first round, above 0 in the last.

    Raises:
        KeyError: no schedule of this name (the configuration has checked it).
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    left = (steps - step) / (steps - warmup)
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


@dataclass(frozen=True)
class Descent:
    """How a client descends in one round; by default AdamW at a constant learning rate.

    Attributes:
        optimizer: AdamW, or SGD whose weight decay is the gradient of an L2 penalty.
        momentum: Of SGD, in [0, 1).
        schedule: Of the learning rate within the round.
        warmup: Share of the round's steps, in [0, 1), through which the learning rate rises;
            rounded up, as transformers does, but at least one step is left. The first is at 0.
        scale: Of the learning rate in this round, above 0.
        rounds: So many rounds, as long as each other, the steps stand for; 1 for a round alone.
        round_schedule: Of the learning rate from round to round, where they are several.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    schedule: Schedule = "constant"
    warmup: float = 0.0
    scale: float = 1.0
    rounds: int = 1
    round_schedule: Schedule = "constant"

    def make(self, parameters: Parameters, lr: float, weight_decay: float) -> Optimizer:
        """A fresh optimiser."""
        if self.optimizer == "adamw":
            return AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        return SGD(parameters.values(), lr=lr, weight_decay=weight_decay, momentum=self.momentum)

    def factor(self, step: int, steps: int) -> float:
        """What lr is multiplied by in step `step` of 0 .. `steps` - 1."""
        warmup = min(math.ceil(self.warmup * steps), steps - 1)
        round = min(step * self.rounds // steps, self.rounds - 1)
        scale = self.scale * schedule_factor(self.round_schedule, round, self.rounds)
        return scale * schedule_factor(self.schedule, step, steps, warmup)

    def travelled(self, lr: float, steps: int) -> float:
        """The sum of the learning rates of all steps: K lr, where they are constant."""
        return lr * math.fsum(self.factor(step, steps) for step in range(steps))


PLAIN = Descent()


def constant_descent(config: ClientConfig) -> Descent:
    """A client's optimiser at a constant learning rate."""
    return Descent(config.optimizer, config.momentum)


def client_descent(experiment: Experiment, round: int) -> Descent:
    """How clients descend in a round; what would follow the last round is as the last."""
    config, rounds = experiment.client, experiment.federation.rounds
    scale = schedule_factor(config.round_schedule, min(round, rounds) - 1, rounds)
    return Descent(config.optimizer, config.momentum, config.schedule, config.warmup, scale)


def whole_descent(experiment: Experiment) -> Descent:
    """How one model descends that is trained through all rounds at once: a ceiling or a floor.

    `client.schedule` is spread over all steps, and `client.round_schedule` goes on beside it.
    """
    config, rounds = experiment.client, experiment.federation.rounds
    return replace(
        client_descent(experiment, 1), rounds=rounds, round_schedule=config.round_schedule
    )


class ClientRule(Protocol):
    """A correction of the gradient; one object for the training of one client in one round."""

    def start(self, parameters: Parameters) -> None:
        """Before the first step: the parameters are what the client received."""

    def adjust(self, parameters: Parameters) -> None:
        """After each backward pass: change the gradients in place."""

    def finish(self, parameters: Parameters, travelled: float) -> None:
        """After the last step; `travelled` is the sum of the learning rates."""


class FedProx:
    """FedProx (Li et al., arXiv 1812.06127): the loss plus mu / 2 ||w - D||^2.

    w are the trainable tensors themselves, A and B, not their product.

    Args:
        mu: At least 0; 0 changes nothing.
    """

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._anchor: dict[str, Tensor] = {}

    def start(self, parameters: Parameters) -> None:
        """Remember D."""
        self._anchor = {name: w.detach().clone() for name, w in parameters.items()}

    def adjust(self, parameters: Parameters) -> None:
        """Add mu (w - D)."""
        for name, w in parameters.items():
            if w.grad is not None:
                w.grad.add_(w.detach() - self._anchor[name], alpha=self._mu)

    def finish(self, parameters: Parameters, travelled: float) -> None:
        """Nothing is kept."""


class Subnetwork:
    """Trains only some columns of a tensor, as FedQSN's masks have it (arXiv 2508.18911, inferred).

    Columns that start at zero stay there: no optimiser here moves what has neither gradient nor
    value.

    Args:
        columns: Name to (columns,) fp32, 1 where a column is trained and 0 where it is not. Other
            tensors are trained whole.
    """

    def __init__(self, columns: State) -> None:
        self._columns = columns
        self._here: State = {}

    def start(self, parameters: Parameters) -> None:
        """Put the flags where the parameters are."""
        self._here = {
            n: self._columns[n].to(w) for n, w in parameters.items() if n in self._columns
        }

    def adjust(self, parameters: Parameters) -> None:
        """Zero the gradient of the other columns."""
        for name, flags in self._here.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.mul_(flags)

    def finish(self, parameters: Parameters, travelled: float) -> None:
        """Nothing is kept."""


class Scaffold:
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378, algorithm 1, option II), under plain SGD.

    Every step is along g - c_i + c. Since D - y = sum_k lr_k (g_k - c_i + c),

        c_i <- c_i - c + (D - y) / sum_k lr_k

    is the mean of the client's own gradients (with weight decay's), weighted by the learning
    rates. So it is under SGD without momentum only: AdamW's D - y is no sum of gradients. c is as
    received: whatever the broadcast rounds off it cancels.

    Args:
        server: c, as the client received it; 0 in the first round.
        client: c_i as the client kept it; 0 when it takes part for the first time.

    Attributes:
        variate: The c_i to be kept for the client, fp32 on the CPU, after the training.
    """

    def __init__(self, server: State, client: State) -> None:
        self._server = server
        self.variate = client
        self._start: State = {}
        self._shift: dict[str, Tensor] = {}

    def start(self, parameters: Parameters) -> None:
        """Remember D, and put c - c_i where the parameters are."""
        self._start = _read(parameters)
        self._shift = {
            name: (self._server[name] - self.variate[name]).to(w) for name, w in parameters.items()
        }

    def adjust(self, parameters: Parameters) -> None:
        """Add c - c_i; a parameter that the loss does not reach has a gradient of 0."""
        for name, w in parameters.items():
            shift = self._shift[name]
            w.grad = shift.clone() if w.grad is None else w.grad.add_(shift)

    def finish(self, parameters: Parameters, travelled: float) -> None:
        """Renew `variate`."""
        self.variate = self.variate | {
            name: (
                self.variate[name].double()
                - self._server[name].double()
                + (self._start[name].double() - end.double()) / travelled
            ).float()
            for name, end in _read(parameters).items()
        }


def next_server_variate(
    variate: State, received: State, mean: Mapping[str, Tensor], *, share: float, travelled: float
) -> State:
    """SCAFFOLD's c <- c + sum_i p_i (c_i_new - c_i), summed over the cohort.

    With option II the server knows the sum without being told: a client's change is -c^ -
    (y_i - D) / T, so c <- c - P (c^ + (K - D) / T), where p_i is a client's share of the whole
    population and P the cohort's. The paper has p_i = 1/N, P = |S|/N. It keeps c = sum_i p_i c_i
    over all clients, as far as the uplink is exact.

    Args:
        variate: c, in full precision.
        received: c^, what clients received of it.
        mean: K - D, of the weights p_i / P. What no client trained keeps its c.
        share: P, in (0, 1].
        travelled: T, the sum of a client's learning rates in this round (`Descent.travelled`).

    Returns:
        The next c, fp32.
    """
    return variate | {
        name: (variate[name] - share * (received[name].double() + k / travelled)).float()
        for name, k in mean.items()
    }


def _read(parameters: Parameters) -> State:
    return {name: w.detach().to("cpu", torch.float32, copy=True) for name, w in parameters.items()}


def client_rules(config: ClientConfig, columns: State) -> list[ClientRule]:
    """Those that follow from the configuration and from what was received.

    Args:
        config: The client's.
        columns: Of each masked tensor the flags of the columns that have come; empty: none is.
    """
    rules: list[ClientRule] = [FedProx(config.proximal)] if config.proximal else []
    return [*rules, Subnetwork(columns)] if columns else rules
