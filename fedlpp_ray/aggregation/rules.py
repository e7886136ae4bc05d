"""The server's rule: from its state S, the broadcast D and the mean return K - D to the next S.

FedLPP's descriptions do not say which it uses. "residual" is inferred: the server keeps its full
precision and moves by what the clients learned, as algorithm MC of Philippenko and Dieuleveut
(arXiv 2102.12528) does.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedlpp_ray.state import State

ServerRule = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(S, D, K - D, learning rate) to the next S: one tensor at a time, float64."""
RULES: dict[str, ServerRule] = {}


def _register(rule: ServerRule) -> ServerRule:
    RULES[rule.__name__] = rule
    return rule


@_register
def residual(state: Tensor, _broadcast: Tensor, mean: Tensor, lr: float) -> Tensor:
    """S + lr (K - D): the server's full precision is never rounded."""
    return state + lr * mean


@_register
def replace(_state: Tensor, broadcast: Tensor, mean: Tensor, lr: float) -> Tensor:
    """D + lr (K - D): at lr = 1, FedAvg of what the clients return."""
    return broadcast + lr * mean


@_register
def pull(state: Tensor, broadcast: Tensor, mean: Tensor, lr: float) -> Tensor:
    """S + lr (K - S): the server moves towards the clients' mean."""
    return state + lr * (broadcast + mean - state)


def apply_rule(name: str, state: State, broadcast: State, mean: State, lr: float) -> State:
    """The next S, computed in float64 and rounded once to fp32.

    Raises:
        KeyError: no rule of this name; `RULES` lists them (the configuration has checked it).
    """
    rule = RULES[name]
    return {
        key: rule(tensor.double(), broadcast[key].double(), mean[key], lr).float()
        for key, tensor in state.items()
    }
