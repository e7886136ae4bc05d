"""From a cohort's returns to the server's next state: rule, optimiser and method together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedlpp_ray.aggregation.methods.base import Method, Return
from fedlpp_ray.aggregation.optimizers import ServerOptimizer
from fedlpp_ray.aggregation.products import Product, combine, product
from fedlpp_ray.aggregation.rules import next_state
from fedlpp_ray.state import State


def fold(
    method: Method,
    state: State,
    broadcast: State,
    returns: Sequence[Return],
    *,
    rule: str,
    lr: float,
    optimizer: ServerOptimizer,
    random: torch.Generator,
) -> State:
    """The server's next state.

    Args:
        method: How factors are aggregated.
        state: S.
        broadcast: D at the server's own rank.
        returns: What the cohort sent, in the cohort's order.
        rule: The server's rule, by name.
        lr: The server's learning rate, for products.
        optimizer: The server's optimiser, for factors.
        random: The round's random numbers, for methods that draw.
    """
    after = next_state(rule, state, broadcast, method.direction(returns, broadcast), optimizer)
    return method.refit(after, product_rule(rule, lr, state, returns), random)


def product_rule(
    rule: str, lr: float, state: State, returns: Sequence[Return]
) -> Callable[[str], Product]:
    """The server's rule on products instead of factors, where a mean is exact.

    With P of a state for B A of one layer, and means over the cohort:

        residual  P(S) + lr (mean P(K_i) - mean P(D_i))
        replace   mean P(D_i) + lr (mean P(K_i) - mean P(D_i))
        pull      P(S) + lr (mean P(K_i) - P(S))

    Returns:
        A function from a layer's name to its next product.
    """
    weights = [each.weight for each in returns]
    ours, received, returned = _COEFFICIENTS[rule](lr)

    def target(layer: str) -> Product:
        products = [product(state, layer)]
        products += [product(each.received, layer) for each in returns]
        products += [product(each.returned, layer) for each in returns]
        factors = [ours, *(received * w for w in weights), *(returned * w for w in weights)]
        kept = [(p, f) for p, f in zip(products, factors, strict=True) if f]
        return combine([p for p, _ in kept], [f for _, f in kept])

    return target


_COEFFICIENTS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "residual": lambda lr: (1.0, -lr, lr),
    "replace": lambda lr: (0.0, 1 - lr, lr),
    "pull": lambda lr: (1 - lr, 0.0, lr),
}
"""Learning rate to the coefficients of P(S), mean P(D_i) and mean P(K_i)."""
