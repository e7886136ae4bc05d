"""FedEx-LoRA (Singhal et al., 2024, arXiv 2410.09432): FedIT, and what it misses goes to the base.

    A <- sum_i p_i A_i,  B <- sum_i p_i B_i,  W0 <- W0 + s (sum_i p_i B_i A_i - B A),  s = alpha/r

Exact. The residue is of full rank and is written into the base: W0 is then no longer public, and a
client that is not sent the residue trains on another base than the server evaluates.
"""

from __future__ import annotations

import torch

from fedlpp_ray.aggregation.methods.base import Method, Target
from fedlpp_ray.aggregation.products import product
from fedlpp_ray.state import State, layers_of, name_of


def _refit(state: State, target: Target, _random: torch.Generator) -> State:
    refitted = dict(state)
    for layer in layers_of(state):
        name = name_of(layer, "residual")
        missed = target(layer).dense() - product(state, layer).dense()
        refitted[name] = (state[name].double() + missed).float()
    return refitted


FEDEX_LORA = Method(refit=_refit, writes_base=True)
