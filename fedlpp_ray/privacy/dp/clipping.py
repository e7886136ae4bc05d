"""Clipping of updates (McMahan et al., 2018, arXiv 1710.06963), and the clip that adapts (Andrew et
al., 2021, arXiv 1905.03871)."""

from __future__ import annotations

import math

import torch

from fedlpp_ray.state import State

CLIP, BELOW = "dp:clip", "dp:below"
"""Names of what travels beside a state where the clip adapts, each of shape (1,): C, with the
broadcast; and with an update 1/2 where it was within C, else -1/2."""
_SHRINK = 1 - 2.0**-22
"""Rounding to fp32 enlarges a norm by at most 2^-24 of it: what is clipped stays within C."""


def norm(update: State) -> float:
    """L2 norm over all tensors together, computed in float64."""
    return math.hypot(
        *(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in update.values())
    )


def clipped(update: State, clip: float) -> State:
    """u min(1, C / ||u||), over all tensors together; an update within C comes back as it is.

    So clipping twice changes no bit.

    Args:
        update: u, fp32: the difference to the broadcast. One that is not finite stays so.
        clip: C.
    """
    size = norm(update)
    if size <= clip:
        return update
    factor = clip / size * _SHRINK
    return {name: (tensor.double() * factor).float() for name, tensor in update.items()}


def next_clip(clip: float, below: float, quantile: float, lr: float) -> float:
    """C exp(-eta (b - gamma)), an fp32 number: smaller where more than gamma are within C.

    Args:
        clip: C.
        below: b, the noised fraction of clients whose update was within C.
        quantile: gamma.
        lr: eta.
    """
    return float(torch.tensor(clip * math.exp(-lr * (below - quantile)), dtype=torch.float32))


def update_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), with which the updates have to be noised.

    Then updates and count together cost what updates noised by z do (Andrew et al., Theorem 1): in
    units of the noise, a client's u of norm C and its bit of -1/2 or 1/2 are together a vector of
    norm 1 / z. One client replaced by another changes the sum by twice that, as it does without the
    count.

    Args:
        noise_multiplier: z.
        count_noise: sigma_b, standard deviation of the noise on the count.

    Raises:
        ValueError: sigma_b is z / 2 or less: the count alone takes the whole budget.
    """
    if noise_multiplier == 0:
        return 0.0
    if 2 * count_noise <= noise_multiplier:
        raise ValueError(f"count noise {count_noise:g}; allowed: above {noise_multiplier / 2:g}")
    return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)
