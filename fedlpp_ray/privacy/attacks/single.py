"""One broadcast as it is: the last, or the one that does best on the adversary's own examples."""

from __future__ import annotations

from fedlpp_ray.privacy.attacks.base import attack
from fedlpp_ray.privacy.view import View
from fedlpp_ray.state import State


@attack("last-broadcast", "broadcast")
def last_broadcast(view: View) -> State:
    """D of the newest broadcast."""
    return view.last.start


@attack("unmasked-broadcast", "broadcast", "masks")
def unmasked_broadcast(view: View) -> State:
    """The newest D without its mask: not scaled, and what it lacks as it was last seen.

    Who reads a mask's flags knows how many columns there are and how many have come, which is its
    factor (FedQSN, arXiv 2508.18911), and a column that nobody ever receives is that of the seed.
    """
    return view.last.state


@attack("best-broadcast", "broadcast")
def best_broadcast(view: View) -> State:
    """D of the lowest validation loss; of equals the newest."""
    return min(reversed(view.received), key=lambda each: view.loss(each.start)).start
