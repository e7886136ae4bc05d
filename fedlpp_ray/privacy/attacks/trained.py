"""Training from what was received, on the colluders' own examples."""

from __future__ import annotations

from fedlpp_ray.aggregation import weighted_mean
from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.means import average_products, recent
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State


@attack("after-training", "trained")
def after_training(view: View) -> State:
    """What the newest broadcast is after the local training of its reader's round."""
    return view.tools.take_part(view.last.state, view.last.client, view.last.made, view.base)


@attack("pooled-updates", "trained")
def pooled_updates(view: View) -> State:
    """The newest broadcast and the mean of all colluders' updates from it: their own next round."""
    last, clients = view.last, sorted(view.tools.clients)
    trained = [view.tools.take_part(last.state, each, last.made, view.base) for each in clients]
    mean = weighted_mean(trained, [1.0] * len(trained))
    return {name: tensor.float() for name, tensor in mean.items()}


@attack("tuned", "trained", "architecture")
def tuned(view: View) -> State:
    """The newest broadcast, tuned on the colluders' examples while their validation improves."""
    return view.tools.tune(view.last.state, view.base)


@attack("tuned-mean", "trained", "architecture")
def tuned_mean(view: View) -> State:
    """The recent mean of the products, tuned likewise."""
    return view.tools.tune(average_products(view, recent(view)), view.base)
