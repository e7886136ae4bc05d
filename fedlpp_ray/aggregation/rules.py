"""The server's rule: from its state S, the broadcast D and the mean return K - D to the next S.

A rule says from where to step and in which direction; the optimiser (`optimizers`) says how far.

FedLPP's descriptions do not say which rule it uses. "residual" is inferred: the server keeps its
full precision and moves by what the clients learned, as algorithm MC of Philippenko and Dieuleveut
(arXiv 2102.12528) does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fedlpp_ray.aggregation.optimizers import ServerOptimizer
from fedlpp_ray.state import State

ServerRule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(S, D, K - D) to (anchor, direction): one tensor at a time, float64."""
RULES: dict[str, ServerRule] = {}


def _register(rule: ServerRule) -> ServerRule:
    RULES[rule.__name__] = rule
    return rule


@_register
def residual(state: Tensor, _broadcast: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """S + lr (K - D): the server's full precision is never rounded."""
    return state, mean


@_register
def replace(_state: Tensor, broadcast: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """D + lr (K - D): at lr = 1, FedAvg of what the clients return."""
    return broadcast, mean


@_register
def pull(state: Tensor, broadcast: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """S + lr (K - S): the server moves towards the clients' mean."""
    return state, broadcast + mean - state


def next_state(
    rule: str,
    state: State,
    broadcast: State,
    mean: Mapping[str, Tensor],
    optimizer: ServerOptimizer,
) -> State:
    """The next S, computed in float64 and rounded once to fp32.

    Args:
        rule: Its name in `RULES`.
        state: S.
        broadcast: D.
        mean: K - D. A tensor that it lacks, because no client trained it, stays as it is in S:
            no momentum moves it.
        optimizer: Steps, and remembers this step.

    Raises:
        KeyError: no rule of this name (the configuration has checked it).
    """
    after = dict(state)
    for name in mean:  # one at a time: in float64 all of them would take twice the memory of S
        anchor, direction = RULES[rule](state[name].double(), broadcast[name].double(), mean[name])
        after[name] = optimizer.step(name, anchor, direction)
    return after
