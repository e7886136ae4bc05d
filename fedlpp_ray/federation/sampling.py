"""Who takes part in a round."""

from __future__ import annotations

import random

from fedlpp_ray.config import FederationConfig
from fedlpp_ray.seeds import derive


def sample_cohort(config: FederationConfig, seed: int, round: int) -> tuple[int, ...]:
    """Clients of a round: `cohort_size` of them without replacement, in ascending order.

    It depends on the seed and the round alone.
    """
    rng = random.Random(derive(seed, "cohort", round))
    return tuple(sorted(rng.sample(range(config.clients), config.cohort_size)))
