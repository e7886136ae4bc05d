"""Against messages of each client's own: broadcasts in one gauge, editions of a round averaged.

(B R, R^T A) of an unknown R is the model of (B, A), and what a rotation hides is only how two
messages lie to each other. That can be estimated: R_t of the orthogonal Procrustes problem
(Schoenemann, 1966) brings a broadcast nearest to the newest,

    min over orthogonal R of ||B_t R - B_T||^2 + ||R^T A_t - A_T||^2:
    R = U V^T,  U S V^T = B_t^T B_T + A_t A_T^T

layer by layer. What follows are the attacks on broadcasts that all share. Each edition of a round
counts, so that what is each one's own, noise, rounding, masks, is averaged over colluders too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.interval import interval
from fedlpp_ray.privacy.attacks.means import average, recent_factors
from fedlpp_ray.privacy.attacks.trend import trend
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State, name_of


@attack("aligned-last", "broadcast", "architecture")
def aligned_last(view: View) -> State:
    """The mean of the colluders' editions of the newest round; of one edition, the newest D."""
    return average(aligned(view), [float(x.made == view.last.made) for x in view.received])


@attack("aligned-factors", "broadcast", "architecture")
def aligned_factors(view: View) -> State:
    """`recent-factors` in one gauge."""
    return recent_factors(aligned(view))


@attack("aligned-trend", "broadcast", "architecture")
def aligned_trend(view: View) -> State:
    """`trend` in one gauge."""
    return trend(aligned(view))


@attack("aligned-interval", "broadcast", "architecture")
def aligned_interval(view: View) -> State:
    """`interval` in one gauge, with the cells of the newest edition, which is not turned."""
    return interval(aligned(view))


def aligned(view: View) -> View:
    """The view in the gauge of the newest broadcast, whose cells alone are left."""
    layers = view.layers()
    earlier = (
        replace(each, state=turn(each.state, view.last.state, layers), cells={})
        for each in view.received[:-1]
    )
    return replace(view, received=(*earlier, view.last))


def turn(state: State, target: State, layers: Iterable[str]) -> State:
    """(B R, R^T A) of each of these layers with the R that brings it nearest to the target's."""
    found = dict(state)
    for layer in layers:
        a, b = name_of(layer, "A"), name_of(layer, "B")
        if b in state:
            own_a, own_b = state[a].double(), state[b].double()
            u, _, vh = torch.linalg.svd(own_b.T @ target[b].double() + own_a @ target[a].double().T)
            rotation = u @ vh
            found |= {a: (rotation.T @ own_a).float(), b: (own_b @ rotation).float()}
    return found
