"""HetLoRA (Cho et al., 2024, arXiv 2401.06432): clients of smaller ranks, padded with zeros.

    K = sum_i w_i pad(K_i),  w_i = ||B_i A_i||_F / sum_j ||B_j A_j||_F

Rows that few clients have are drawn to zero, as published. A client receives the first r_i rows and
columns. The weights take the place of the numbers of examples. The head is averaged with the same
weights. The published pruning of ranks during training is not part of this.
"""

from __future__ import annotations

from fedlpp_ray.aggregation.methods.base import Method, Return
from fedlpp_ray.aggregation.products import norm
from fedlpp_ray.state import State


def _contribution(each: Return, broadcast: State) -> tuple[float, State]:
    """By the norm of what a client holds; those that hold nothing count where all do."""
    returned = each.returned
    moved = {n: returned[n].double() - broadcast[n].double() for n in each.update}
    return norm(returned), moved


HETLORA = Method(contribution=_contribution, mixed_ranks=True)
