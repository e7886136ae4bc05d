"""HetLoRA (Cho et al., 2024, arXiv 2401.06432): clients of smaller ranks, padded with zeros.

    K = sum_i w_i pad(K_i),  w_i = ||B_i A_i||_F / sum_j ||B_j A_j||_F

Rows that few clients have are drawn to zero, as published. A client receives the first r_i rows and
columns. The weights take the place of the numbers of examples. The head is averaged with the same
weights. The published pruning of ranks during training is not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlpp_ray.aggregation.methods.base import Method, Return
from fedlpp_ray.aggregation.products import norm
from fedlpp_ray.state import State


def _weights(returns: Sequence[Return]) -> list[float]:
    """By the norm of what each client holds; equal where all hold nothing."""
    norms = [norm(each.returned) for each in returns]
    total = sum(norms)
    return [n / total for n in norms] if total else [1 / len(norms)] * len(norms)


def _direction(returns: Sequence[Return], broadcast: State) -> State:
    mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in broadcast.items()}
    for each, weight in zip(returns, _weights(returns), strict=True):
        for name, tensor in each.returned.items():
            mean[name] += weight * tensor.double()
    return {name: mean[name] - broadcast[name].double() for name in mean}


HETLORA = Method(direction=_direction, mixed_ranks=True)
