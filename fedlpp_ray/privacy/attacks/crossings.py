"""Crossings: the round in which a code changes says where the server's value was just then.

Codes are coarse in value, not in time: a value that moves little from round to round is at the end
of its new cell when its code changes, whatever margin hysteresis gives that cell, and two such
moments make a line. That samples at the crossings of a quantizer determine a signal better than the
levels do, and that an estimate must agree with all cells, is Thao and Vetterli, "Convex coders and
oversampled A/D conversion" (1991).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.view import Received, View
from fedlpp_ray.state import State


@attack("crossings", "broadcast")
def crossings(view: View) -> State:
    """Of each value the line through its last two crossings, moved into the newest cell.

    Where there was no crossing, or there are no cells, the newest broadcast. Of several editions of
    a round the last one is read.
    """
    rounds = {each.made: each for each in view.received}.values()
    return {
        name: _followed([x for x in rounds if name in x.cells], name)
        if name in view.last.cells
        else tensor
        for name, tensor in view.last.state.items()
    }


def _followed(received: list[Received], name: str) -> Tensor:
    """One tensor; the first broadcast stands for a crossing that has not been seen."""
    first, newest = received[0], received[-1]
    value, rate = first.state[name], torch.zeros_like(first.state[name])
    time, seen = torch.full_like(value, first.made), torch.zeros_like(value, dtype=torch.bool)
    for last, each in pairwise(received):
        low, high = each.cells[name]
        before, when = last.state[name], (last.made + each.made) / 2
        # A scale moves a value by less than a quarter of its cell, another code by more.
        crossed = (each.state[name] - before).abs() > (high - low) / 4
        entered = before.clamp(low, high)
        rate = torch.where(crossed, (entered - value) / (when - time), rate)
        value = torch.where(crossed, entered, value)
        time = torch.where(crossed, when, time)
        seen |= crossed
    line = (value + rate * (newest.made - time)).clamp(*newest.cells[name])
    return torch.where(seen, line, newest.state[name])
