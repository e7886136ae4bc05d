"""FlexLoRA (Bai et al., 2024, arXiv 2402.11505): the mean of the products, cut back by an SVD.

    P = sum_i p_i (alpha/r_i) B_i A_i = U S V^T,  B = U sqrt(S),  A = sqrt(S) V^T, rank R kept

A client of rank r_i receives the first r_i columns and rows, which are the best product of that
rank. Exact up to the truncation to R.
"""

from __future__ import annotations

import torch

from fedlpp_ray.aggregation.methods.base import Method, Target
from fedlpp_ray.aggregation.products import Matrix, Product, rank_of
from fedlpp_ray.state import State, layers_of, name_of


def _refit(state: State, target: Target, _random: torch.Generator) -> State:
    rank = rank_of(state)
    refitted = dict(state)
    for layer in layers_of(state):
        b, a = balanced(target(layer), rank)
        refitted[name_of(layer, "B")], refitted[name_of(layer, "A")] = b.float(), a.float()
    return refitted


def balanced(product: Product | Matrix, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (d_out, r) and A (r, d_in) of the best approximation of rank r, with S shared equally.

    Signs are fixed (the largest entry of each column of B is positive), so that equal products give
    equal factors. Where the product has a smaller rank, the rest is zero.
    """
    u, s, vh = product.svd()
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    root = s.sqrt()
    b, a = (u * sign * root)[:, :rank], (sign.T * root[:, None] * vh)[:rank]
    missing = rank - b.shape[1]
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


FLEXLORA = Method(refit=_refit, mixed_ranks=True)
