"""Interval-constrained estimate: the codes and scales of the newest broadcast bound the server's S.

With rounding to nearest, S lies in the cell of each code: between the midpoints to the neighbouring
levels, times the block's scale. The mean of the broadcasts is the better guess inside the cell, and
a wrong one outside of it.
"""

from __future__ import annotations

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
