"""Against messages of each client's own: broadcasts in one gauge, editions of a round averaged.

(B R, R^T A) of an unknown R is the model of (B, A), and what a rotation hides is only how two
messages lie to each other. That can be estimated: R_t of the orthogonal Procrustes problem
(Schoenemann, 1966) brings a broadcast nearest to the newest,

    min over orthogonal R of ||B_t R - B_T||^2 + ||R^T A_t - A_T||^2:
    R = U V^T,  U S V^T = B_t^T B_T + A_t A_T^T

layer by layer. Colluders then average their editions of one round, which takes out of them what is
each one's own: noise, rounding, masks. What follows are the attacks on shared broadcasts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.interval import interval
from fedlpp_ray.privacy.attacks.means import recent_factors
from fedlpp_ray.privacy.attacks.trend import trend
from fedlpp_ray.privacy.view import Received, View
from fedlpp_ray.state import State, layers_of, name_of


@attack("aligned-last", "broadcast")
def aligned_last(view: View) -> State:
    """The mean of the colluders' editions of the newest round; of one edition, the newest D."""
    return aligned(view).last.state


@attack("aligned-factors", "broadcast")
def aligned_factors(view: View) -> State:
    """`recent-factors` of aligned rounds."""
    return recent_factors(aligned(view))


@attack("aligned-trend", "broadcast")
def aligned_trend(view: View) -> State:
    """`trend` of aligned rounds."""
    return trend(aligned(view))


@attack("aligned-interval", "broadcast")
def aligned_interval(view: View) -> State:
    """`interval` of aligned rounds: only the newest edition's cells are in its gauge."""
    return interval(aligned(view))


def aligned(view: View) -> View:
    """The view with one broadcast for each round, in the gauge of the newest."""
    rounds = groupby(view.received, key=lambda each: each.made)
    found = [_pooled(list(editions), view.last) for _, editions in rounds]
    return replace(view, received=tuple(found))


def _pooled(editions: list[Received], target: Received) -> Received:
    """The mean of the editions of a round, each turned to the target."""
    turned = [each.state if each is target else turn(each.state, target.state) for each in editions]
    state = turned[0]
    if len(turned) > 1:
        state = {n: torch.stack([x[n] for x in turned]).double().mean(0).float() for n in state}
    cells = target.cells if editions[-1] is target else {}
    return replace(editions[-1], state=state, cells=cells)


def turn(state: State, target: State) -> State:
    """(B R, R^T A) of each layer with the R that brings it nearest to the target's."""
    found = dict(state)
    for layer in layers_of(sorted(state)):
        a, b = name_of(layer, "A"), name_of(layer, "B")
        if b in state:
            own_a, own_b = state[a].double(), state[b].double()
            u, _, vh = torch.linalg.svd(own_b.T @ target[b].double() + own_a @ target[a].double().T)
            rotation = u @ vh
            found |= {a: (rotation.T @ own_a).float(), b: (own_b @ rotation).float()}
    return found
