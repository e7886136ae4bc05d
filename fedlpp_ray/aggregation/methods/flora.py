"""FLoRA (Wang et al., 2024, arXiv 2409.05976): the stacked products go to the base, LoRA restarts.

    W0 <- W0 + s [B_1 .. B_n] [p_1 A_1; ..; p_n A_n],  s = alpha/r_i;  then a new A, and B = 0

Exact at any mixture of ranks. The published protocol sends the stack to every client in every
round; here clients are sampled, so the sum of all stacks is what must be sent, and it is dense.
W0 is then no longer public, and a client that is not sent the residue never sees what was learned.
"""

from __future__ import annotations

import math

import torch

from fedlpp_ray.aggregation.methods.base import Method, Target
from fedlpp_ray.state import State, layers_of, name_of


def _refit(state: State, target: Target, random: torch.Generator) -> State:
    refitted = dict(state)
    for layer in layers_of(state):
        name = name_of(layer, "residual")
        refitted[name] = (state[name].double() + target(layer).dense()).float()
        a = state[name_of(layer, "A")]
        bound = 1 / math.sqrt(a.shape[1])  # as PEFT draws it
        fresh = torch.rand(a.shape, generator=random, dtype=torch.float32)
        refitted[name_of(layer, "A")] = (2 * fresh - 1) * bound
        refitted[name_of(layer, "B")] = torch.zeros_like(state[name_of(layer, "B")])
    return refitted


FLORA = Method(refit=_refit, mixed_ranks=True, writes_base=True)
