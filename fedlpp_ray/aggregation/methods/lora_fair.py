"""LoRA-FAIR (Bian et al., 2024, arXiv 2411.14961): FedIT, with B corrected towards the product.

    B <- B + dB,  dB = argmin ||P - (B + dB) A||_F^2 + mu ||dB||_F^2,  P = sum_i p_i B_i A_i
       = (P - B A) A^T (A A^T + mu I)^-1

The published objective measures the first term by a similarity and is minimised step by step; this
is its least-squares form, which has a closed solution: an adaptation, not the publication's code.
mu is relative: 0.01 of the mean of A A^T's diagonal. A is FedIT's mean. Not exact: it is as near as
the rows of A allow.
"""

from __future__ import annotations

import torch

from fedlpp_ray.aggregation.methods.base import Method, Target
from fedlpp_ray.state import State, layers_of, name_of

MU = 0.01


def _refit(state: State, target: Target, _random: torch.Generator) -> State:
    refitted = dict(state)
    for layer in layers_of(state):
        name = name_of(layer, "B")
        a, b = state[name_of(layer, "A")].double(), state[name].double()
        wanted = target(layer)
        missed = wanted.times(a.T) - b @ (a @ a.T)  # (P - B A) A^T
        gram = a @ a.T
        ridge = MU * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        correction = torch.linalg.solve(gram + ridge, missed.T).T
        refitted[name] = (b + correction).float()
    return refitted


LORA_FAIR = Method(refit=_refit)
