"""Extrapolation: where the broadcasts were going, without what rounding adds to each."""

from __future__ import annotations

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.means import average, average_products
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State

WINDOW = 6
"""Newest broadcasts that the line is laid through."""


@attack("trend", "broadcast")
def trend(view: View) -> State:
    """The value at the newest broadcast of the least-squares line through the newest `WINDOW`.

    Of fewer than three broadcasts it is the newest.
    """
    return average(view, line(view))


@attack("trend-products", "broadcast", "architecture")
def trend_products(view: View) -> State:
    """The rank-r part of the same of the products B A; what is no factor as `trend`."""
    return average_products(view, line(view))


def line(view: View) -> list[float]:
    """Weights 1/n + (T - mean t) (t - mean t) / sum (t - mean t)^2, of sum 1, some negative."""
    times = [float(each.made) for each in view.received]
    first = sorted(set(times))[-WINDOW:][0]
    used = [t for t in times if t >= first]
    if len(set(used)) < 3:
        return [0.0] * (len(times) - 1) + [1.0]
    centre = sum(used) / len(used)
    spread = sum((t - centre) ** 2 for t in used)
    weights = [1 / len(used) + (used[-1] - centre) * (t - centre) / spread for t in used]
    return [0.0] * (len(times) - len(used)) + weights
