"""Means of broadcasts: what rounding adds differs from round to round, so averaging takes it away.

Of factors, which presupposes that the gauge stays, and of products B A, which does not: the mean
product has a higher rank, and its largest singular values are kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

import torch
from torch import Tensor

from fedlpp_ray.aggregation.products import combine, product
from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.view import View, ViewError
from fedlpp_ray.state import State, name_of

HALVING = 3.0
"""Broadcasts after which a weight has halved, in a mean towards the recent ones."""


@attack("mean-factors", "broadcast")
def mean_factors(view: View) -> State:
    """(1/T) sum_t D_t."""
    return average(view, [1.0] * len(view.received))


@attack("mean-products", "broadcast", "architecture")
def mean_products(view: View) -> State:
    """The rank-r part of (1/T) sum_t B_t A_t; what is no factor as `mean-factors`."""
    return average_products(view, [1.0] * len(view.received))


@attack("recent-factors", "broadcast")
def recent_factors(view: View) -> State:
    """As `mean-factors`, with weights that halve every `HALVING` broadcasts back."""
    return average(view, recent(view))


@attack("recent-products", "broadcast", "architecture")
def recent_products(view: View) -> State:
    """As `mean-products`, with weights that halve every `HALVING` broadcasts back."""
    return average_products(view, recent(view))


@attack("mean-products-full", "broadcast", "architecture")
def mean_products_full(view: View) -> State:
    """(1/T) sum_t B_t A_t whole, beside factors whose product is zero."""
    return average_products_whole(view, [1.0] * len(view.received))


@attack("recent-products-full", "broadcast", "architecture")
def recent_products_full(view: View) -> State:
    """As `mean-products-full`, with weights that halve every `HALVING` broadcasts back."""
    return average_products_whole(view, recent(view))


@attack("mean-final", "broadcast", "average")
def mean_final(view: View) -> State:
    """The mean over the averaged states of the newest broadcast that was read by then.

    For `server.final_average` (Polyak and Juditsky, 1992), by who knows of it.
    """
    if not view.averaged:
        raise ViewError("the server's final model is no mean of its states")
    editions = Counter(each.made for each in view.received)
    made = sorted(editions)
    newest = Counter(made[max(bisect_right(made, round) - 1, 0)] for round in view.averaged)
    return average(view, [newest[each.made] / editions[each.made] for each in view.received])


def recent(view: View) -> list[float]:
    """Weights 2^(-age / HALVING); the newest broadcast has age 0, all its editions have."""
    made = sorted({each.made for each in view.received}, reverse=True)
    return [2.0 ** (-made.index(each.made) / HALVING) for each in view.received]


def average(view: View, weights: list[float]) -> State:
    """Weighted mean of all tensors; weights may be of any sum but 0."""
    total = sum(weights)
    return {name: _mean(view, name, [w / total for w in weights]) for name in view.last.state}


def average_products(view: View, weights: list[float]) -> State:
    """Weighted mean of the products, cut to the rank of the factors: B = U sqrt(S), A = sqrt(S) V.

    Where only one of the two factors is there, it is the mean of the factors.
    """
    total = sum(weights)
    found = average(view, weights)
    for layer in view.layers():
        a, b = name_of(layer, "A"), name_of(layer, "B")
        if b not in found:
            continue
        products = [product(each.state, layer) for each in view.received]
        u, s, vh = combine(products, [w / total for w in weights]).svd()
        kept = min(found[a].shape[0], len(s))
        root = s[:kept].sqrt()
        found[a] = _filled(found[a], root[:, None] * vh[:kept], 0)
        found[b] = _filled(found[b], u[:, :kept] * root, 1)
    return found


def average_products_whole(view: View, weights: list[float]) -> State:
    """Weighted mean of the products in no factors: each layer's is its residual, (d_out, d_in).

    Without LoRA's factors it is the mean of all tensors.
    """
    total = sum(weights)
    found = average(view, weights)
    for layer in view.layers():
        b, residual = name_of(layer, "B"), name_of(layer, "residual")
        if b not in found:
            continue
        products = [product(each.state, layer) for each in view.received]
        mean = combine(products, [w / total for w in weights]).dense().float()
        found[residual] = mean + found.get(residual, torch.zeros_like(mean))
        found[b] = torch.zeros_like(found[b])
    return found


def _mean(view: View, name: str, weights: list[float]) -> Tensor:
    first = view.last.state[name]
    mean = torch.zeros(first.shape, dtype=torch.float64)
    for weight, each in zip(weights, view.received, strict=True):
        mean += weight * each.state[name].double()
    return mean.float()


def _filled(like: Tensor, values: Tensor, axis: int) -> Tensor:
    """Zeros of a factor's shape with the values that there are first along the rank."""
    factor = torch.zeros_like(like)
    factor.narrow(axis, 0, values.shape[axis]).copy_(values)
    return factor
