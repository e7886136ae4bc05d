"""Training from what was received, on the colluders' own examples."""

from __future__ import annotations

from itertools import pairwise

from fedlpp_ray.aggregation import weighted_mean
from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.attacks.means import average_products, recent
from fedlpp_ray.privacy.view import Received, View, ViewError
from fedlpp_ray.state import State


@attack("after-training", "trained")
def after_training(view: View) -> State:
    """What the newest broadcast is after the local training of its reader's round."""
    return view.tools.take_part(view.last, view.last.client, view.base)


@attack("pooled-updates", "trained")
def pooled_updates(view: View) -> State:
    """The newest broadcast and the mean of all colluders' updates from it: their own next round."""
    last, clients = view.last, sorted(view.tools.clients)
    trained = [view.tools.take_part(last, each, view.base) for each in clients]
    mean = weighted_mean(trained, [1.0] * len(trained))
    return {name: tensor.float() for name, tensor in mean.items()}


@attack("followed", "trained", "architecture", "returns")
def followed(view: View) -> State:
    """S, followed from the seed by what the colluders themselves have returned.

    S_(t+1) = S_t + lr mean of the cohort's updates; of that mean theirs is an estimate, and the
    next broadcast's cells bound what it comes to. A whole cohort that colludes in every round has S
    itself, whatever the bits of the broadcast. After a round of which they have read nothing it
    goes on from the newest D.
    """
    if view.returns is None:
        raise ViewError("the server's state does not follow from what the adversary has returned")
    first, found = view.received[0], view.returns.initial
    if first.made > 1:
        found = first.state
    for each, following in pairwise(view.received):
        if following.made > each.made + 1:
            found = following.state
        else:
            found = _into(_moved(view, found, each), following)
    return found


def _moved(view: View, state: State, read: Received) -> State:
    """A state after the round of a broadcast, as far as the colluders' returns say."""
    returns = view.returns
    if returns is None or read.made not in returns.weights:
        return state
    clients, weights = zip(*sorted(returns.weights[read.made].items()), strict=True)
    made = [view.tools.take_part(read, each, "client") for each in clients]
    mean = weighted_mean(made, list(weights))
    return {n: (x + returns.lr * (mean[n] - read.start[n])).float() for n, x in state.items()}


def _into(state: State, received: Received) -> State:
    """A state within what a broadcast says: in its cells, and where there are none, it."""
    return {
        name: state[name].clamp(*received.cells[name]) if name in received.cells else tensor
        for name, tensor in received.state.items()
    }


@attack("tuned", "trained", "architecture")
def tuned(view: View) -> State:
    """The newest broadcast, tuned on the colluders' examples while their validation improves."""
    return view.tools.tune(view.last.state, view.base)


@attack("tuned-mean", "trained", "architecture")
def tuned_mean(view: View) -> State:
    """The recent mean of the products, tuned likewise."""
    return view.tools.tune(average_products(view, recent(view)), view.base)
