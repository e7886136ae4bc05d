"""The weighted mean of client returns."""

from __future__ import annotations

from collections.abc import Sequence

from fedlpp_ray.aggregation.exact import ExactMean
from fedlpp_ray.state import State, schema_of


def weighted_mean(returns: Sequence[State], weights: Sequence[float]) -> State:
    """sum_i w_i x_i / sum_i w_i, with the same bits in any order (`exact`).

    Args:
        returns: One state a client, all with the same names and shapes.
        weights: w_i, positive, one a client.

    Returns:
        A float64 state.

    Raises:
        OverflowError, ValueError: as `ExactSum.add`.
    """
    mean = ExactMean(schema_of(returns[0]), len(returns))
    for state, weight in zip(returns, weights, strict=True):
        mean.add(state, weight)
    return mean.values()
