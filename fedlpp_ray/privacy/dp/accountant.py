"""Epsilon of a federation, by the RDP accountant of `dp-accounting`.

Neighbours are two federations of N clients that differ in the data, all of them, of one client
(replace-one). A round samples m of the N, uniformly and without replacement, and publishes the sum
of what each contributed, a vector of norm C at most, plus N(0, (z C)^2). One client changes that
sum by 2 C at most, so the accountant's noise multiplier, which is the standard deviation of the
noise over that sensitivity, is z / 2.

Each round is bounded twice: by Theorem 27 of Wang, Balle and Kasiviswanathan (2019, arXiv
1808.00087), for sampling without replacement, and by the Gaussian mechanism without amplification
by sampling, which is smaller where the cohort is a large share or the noise is small. Both hold, so
epsilon is the smaller one. It is an upper bound: of one round without sampling a tenth above the
exact value (Balle and Wang, 2018, arXiv 1805.06530) at epsilon 1 and delta 1e-5.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import Any

from fedlpp_ray.errors import UserError

_SENSITIVITY = 2.0
"""In units of C: of a sum in which one client is replaced."""


def check_accountant() -> None:
    """Refuse to go on without the accountant.

    Raises:
        UserError: naming the extra to install.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise UserError("dp.clip needs an accountant: pip install 'fedlpp_ray[privacy]'")


def epsilon_of(
    rounds: int, *, clients: int, sampled: int, noise_multiplier: float, delta: float
) -> float:
    """Epsilon after some rounds; infinite without noise.

    Args:
        rounds: How many, those that were abandoned included.
        clients: N.
        sampled: m, clients sampled each round, those that did not return included.
        noise_multiplier: z: the noise on the sum has standard deviation z C.
        delta: Above 0, below 1.

    Raises:
        UserError: as `check_accountant`.
    """
    if noise_multiplier == 0:
        return math.inf if rounds else 0.0
    check_accountant()
    import dp_accounting as dp

    bounds = _round(clients, sampled, noise_multiplier)
    return min(float(dp.rdp.compute_epsilon(o, rounds * rdp, delta)[0]) for o, rdp in bounds)


@lru_cache
def _round(clients: int, sampled: int, noise_multiplier: float) -> list[tuple[Any, Any]]:
    """Of both bounds of a round, the orders and the RDP at each; rounds add up."""
    import dp_accounting as dp

    gaussian = dp.GaussianDpEvent(noise_multiplier / _SENSITIVITY)
    found = []
    for event in (gaussian, dp.SampledWithoutReplacementDpEvent(clients, sampled, gaussian)):
        accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        accountant.compose(event)
        found.append((accountant.orders, accountant.rdp))
    return found
