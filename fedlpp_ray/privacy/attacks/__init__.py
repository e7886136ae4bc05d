"""The attack ladder: each attack makes the state of a model of what an adversary has."""

from fedlpp_ray.privacy.attacks import single, means, trend, interval, crossings  # noqa: I001  the order of the ladder
from fedlpp_ray.privacy.attacks import aligned, trained, distilled
from fedlpp_ray.privacy.attacks.base import (
    ATTACKS,
    Attack,
    Known,
    Level,
    feasible,
    find_attacks,
)

__all__ = [
    "ATTACKS",
    "Attack",
    "Known",
    "Level",
    "aligned",
    "crossings",
    "distilled",
    "feasible",
    "find_attacks",
    "interval",
    "means",
    "single",
    "trained",
    "trend",
]
