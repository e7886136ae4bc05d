"""Interval-constrained estimates: the codes and scales of broadcasts bound the server's S.

With rounding to nearest, S lies in the cell of each code: between the midpoints to the neighbouring
levels, times the block's scale. The mean of the broadcasts is the better guess inside the cell, and
a wrong one outside of it. Cells of several rounds that all have S in them meet in a smaller one, of
a constant under T known dithers in 2 / (T + 1) of a step, which is faster than any mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.means import average, recent
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State


@attack("interval", "broadcast")
def interval(view: View) -> State:
    """The recent mean of the factors, moved into the cells of the newest broadcast."""
    found = average(view, recent(view))
    for name, (low, high) in view.last.cells.items():
        found[name] = found[name].clamp(low, high)
    return found


@attack("intersection", "broadcast")
def intersection(view: View) -> State:
    """The middle of where the cells meet; without a bound the recent mean of the factors.

    Of each value the newest cell is cut with the one before, and so on, as long as something is
    left: where nothing is, S has moved, and older cells say nothing of it. If S moves by less than
    a cell, what is left can be beside it: then `interval` is the better one.
    """
    found = average(view, recent(view))
    for name, cell in view.last.cells.items():
        low, high = _met(view, name, *cell)
        middle = (low + high) / 2
        found[name] = torch.where(middle.isfinite(), middle, found[name])
    return found


def _met(view: View, name: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    going = torch.ones_like(low, dtype=torch.bool)
    for each in view.received[-2::-1]:
        if name in each.cells:
            least, most = (
                torch.maximum(low, each.cells[name][0]),
                torch.minimum(high, each.cells[name][1]),
            )
            going &= least <= most
            low, high = torch.where(going, least, low), torch.where(going, most, high)
    return low, high
