"""One broadcast as it is: the last, or the one that does best on the adversary's own examples."""

from __future__ import annotations

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State


@attack("last-broadcast", "broadcast")
def last_broadcast(view: View) -> State:
    """D of the newest broadcast."""
    return view.last.state


@attack("best-broadcast", "broadcast")
def best_broadcast(view: View) -> State:
    """D of the lowest validation loss; of equals the newest."""
    return min(reversed(view.received), key=lambda each: view.loss(each.state)).state
