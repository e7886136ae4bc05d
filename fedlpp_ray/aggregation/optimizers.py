"""The server's optimiser: how far to move along the mean return, with memory of earlier rounds.

FedOpt (Reddi et al., arXiv 2003.00295, algorithm 2) takes the mean return as a direction d, that
is -d as a pseudo-gradient, and hands it to an optimiser. With S = anchor + step, step by name:

    fedavg        lr d                                    McMahan et al., arXiv 1602.05629
    fedavgm       lr m,  m <- momentum m + d              Hsu et al., arXiv 1909.06335
    fedadagrad    lr d / (sqrt(v) + tau),  v <- v + d^2
    fedadam       lr m / (sqrt(v) + tau),  m <- beta1 m + (1 - beta1) d,
                                           v <- beta2 v + (1 - beta2) d^2
    fedyogi       as fedadam, but          v <- v - (1 - beta2) d^2 sign(v - d^2)

from m = 0 and v = tau^2, without bias correction. Where torch's optimisers would differ:

* Adam corrects the bias of moments that start from 0 by 1 - beta^t, which algorithm 2 does not.
  Here it counts from t = inf, where the correction is exactly 1, and from v = tau^2, not 0.
* Adagrad has no first moment: algorithm 2 at beta1 = 0, as in the paper's experiments.
  `initial_accumulator_value` is v at the start, `eps` is tau; torch puts it outside the root too.
* SGD's momentum is that of FedAvgM: the first step takes d undamped.
* torch has no Yogi. That of pytorch-optimizer 4.1 starts m at v's value and corrects the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer

from fedlpp_ray.state import Schema, State, schema_of

OptimizerName = Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]


class ServerOptimizer:
    """A torch optimiser a tensor, which steps from an anchor given anew each time.

    None of the optimisers looks at where it stands, so each step starts from 0 in float64 and is
    added to the anchor: fedavg has the bits of anchor + lr * direction. Between steps only their
    memory takes any.

    Args:
        optimizers: By name, each of one float64 parameter, its state filled in from the start.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizers = optimizers

    def step(self, name: str, anchor: Tensor, direction: Tensor) -> Tensor:
        """anchor + step of one tensor, computed in float64 and rounded once to fp32.

        Args:
            name: Which. The moments of a tensor that is not stepped do not age.
            anchor: Where to step from.
            direction: Where to go, e.g. K - D: the negative of the pseudo-gradient.
        """
        parameter = _parameter(self._optimizers[name])
        parameter.data = torch.zeros(direction.shape, dtype=torch.float64)
        parameter.grad = -direction.double()
        self._optimizers[name].step()
        after = (anchor + parameter).float()
        parameter.grad = None
        parameter.data = parameter.new_empty(0)
        return after

    def state_dict(self) -> State:
        """A copy of the optimiser's memory as flat tensors, e.g. "exp_avg/NAME", for safetensors.

        fedavg has none: an empty dictionary.
        """
        return {name: tensor.clone() for name, tensor in self._memory().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the same bits from what `state_dict` returned.

        Raises:
            ValueError: it is of another optimiser or of other tensors.
        """
        memory = self._memory()
        if schema_of(dict(state)) != schema_of(memory):
            raise ValueError("the optimiser state's tensors are not those of this experiment")
        for name, tensor in memory.items():
            tensor.copy_(state[name])

    def _memory(self) -> State:
        return {
            f"{key}/{name}": value
            for name, optimizer in self._optimizers.items()
            for key, value in optimizer.state[_parameter(optimizer)].items()
        }


def make_optimizer(
    name: OptimizerName,
    schema: Schema,
    *,
    lr: float,
    momentum: float = 0.9,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> ServerOptimizer:
    """The optimiser of this name, new; see the module's formulas for who uses what.

    Args:
        name: Which.
        schema: Names and shapes of the state.
        lr: Learning rate of the server.
        momentum: Of fedavgm, in [0, 1).
        beta1: Decay of the first moment, in [0, 1). fedadam and fedyogi.
        beta2: Decay of the second moment, in [0, 1). fedadam and fedyogi.
        tau: Degree of adaptivity, above 0; smaller is more adaptive. fedadagrad, -adam, -yogi.

    Raises:
        KeyError: no optimiser of this name (the configuration has checked it).
    """
    betas = beta1, beta2
    make: Callable[[list[Tensor]], Optimizer]
    match name:
        case "fedavg":
            make, memory = partial(SGD, lr=lr), {}
        case "fedavgm":
            make, memory = partial(SGD, lr=lr, momentum=momentum), {"momentum_buffer": 0.0}
        case "fedadagrad":
            make, memory = partial(Adagrad, lr=lr, initial_accumulator_value=tau**2, eps=tau), {}
        case "fedadam":
            make = partial(Adam, lr=lr, betas=betas, eps=tau)
            memory = {"exp_avg": 0.0, "exp_avg_sq": tau**2}
        case "fedyogi":
            make = partial(Yogi, lr=lr, betas=betas, eps=tau)
            memory = {"exp_avg": 0.0, "exp_avg_sq": tau**2}
        case _:
            raise KeyError(name)
    optimizers = {}
    for key, shape in schema.items():
        optimizers[key] = optimizer = make([torch.zeros(shape, dtype=torch.float64)])
        parameter = _parameter(optimizer)
        state = optimizer.state[parameter]
        # What torch would fill in with 0, or lacks, at the first step.
        state.update({k: torch.full_like(parameter, value) for k, value in memory.items()})
        if name == "fedadam":
            state["step"] = torch.tensor(math.inf)
        parameter.data = parameter.new_empty(0)
    return ServerOptimizer(optimizers)


def _parameter(optimizer: Optimizer) -> Tensor:
    """The one that it has."""
    parameter: Tensor = optimizer.param_groups[0]["params"][0]
    return parameter


class Yogi(Optimizer):
    """Yogi (Zaheer et al., NeurIPS 2018) without bias correction: the module's formula of fedyogi.

    Its state, `exp_avg` and `exp_avg_sq` of each parameter, is filled in by `make_optimizer`.
    """

    def __init__(
        self, params: list[Tensor], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the negative gradients."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, square = self.state[parameter], parameter.grad.square()
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.lerp_(parameter.grad, 1 - beta1)
                second.addcmul_(square, (second - square).sign(), value=beta2 - 1)
                parameter.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-group["lr"])
