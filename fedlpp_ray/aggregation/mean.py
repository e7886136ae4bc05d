"""The weighted mean of client returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fedlpp_ray.state import State


def weights(examples: Sequence[int], weighting: Literal["examples", "uniform"]) -> list[float]:
    """One weight a client, summing to 1: n_i / sum n, or equal."""
    counts = examples if weighting == "examples" else [1] * len(examples)
    return [count / sum(counts) for count in counts]


def weighted_mean(returns: Sequence[State], weights: Sequence[float]) -> State:
    """K - D = sum_i p_i (a_i - D), FedLPP's mean of the returns.

    Summed in float64 in the order given, so that the result does not depend on who finished first.

    Args:
        returns: One state a client, all with the same names and shapes.
        weights: p_i, one a client.

    Returns:
        A float64 state.
    """
    mean = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in returns[0].items()
    }
    for state, weight in zip(returns, weights, strict=True):
        for name in mean:
            mean[name] += weight * state[name].double()
    return mean
