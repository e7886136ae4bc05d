"""Client-level differential privacy, as pure functions: clipping, noise, and the accountant."""

from fedlpp_ray.privacy.dp.accountant import check_accountant, epsilon_of
from fedlpp_ray.privacy.dp.clipping import (
    BELOW,
    CLIP,
    clipped,
    next_clip,
    norm,
    update_multiplier,
)
from fedlpp_ray.privacy.dp.noise import NoisedMean, draw_for, with_noise

__all__ = [
    "BELOW",
    "CLIP",
    "NoisedMean",
    "check_accountant",
    "clipped",
    "draw_for",
    "epsilon_of",
    "next_clip",
    "norm",
    "update_multiplier",
    "with_noise",
]
