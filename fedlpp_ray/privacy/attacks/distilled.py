"""Distillation: what the recent broadcasts say of auxiliary text is taught to one model.

Averaged are probabilities, so that neither a gauge that turns nor the rank of a mean product is in
the way: of what rounding does to each broadcast, what differs from one to the next is averaged in
the function itself. So is what the model has learnt since the older ones, as in any mean.
"""

from __future__ import annotations

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.means import average_products, recent
from fedlpp_ray.privacy.attacks.trend import WINDOW
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State


@attack("distilled", "trained", "architecture", "auxiliary")
def distilled(view: View) -> State:
    """The newest broadcast, taught the recent mean of the newest `WINDOW` rounds' probabilities."""
    return view.tools.distil(view.last.state, teachers(view), view.base)


@attack("distilled-mean", "trained", "architecture", "auxiliary")
def distilled_mean(view: View) -> State:
    """The recent mean of the products, taught likewise."""
    return view.tools.distil(average_products(view, recent(view)), teachers(view), view.base)


def teachers(view: View) -> list[tuple[float, State]]:
    """Every edition of the newest `WINDOW` rounds, with weights of sum 1 that halve as `recent`."""
    first = sorted({each.made for each in view.received})[-WINDOW:][0]
    weighed = zip(recent(view), view.received, strict=True)
    used = [(weight, each.state) for weight, each in weighed if each.made >= first]
    total = sum(weight for weight, _ in used)
    return [(weight / total, state) for weight, state in used]
