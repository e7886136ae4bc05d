"""RoLoRA (Chen et al., 2024, arXiv 2502.01755): odd rounds train and average B, even rounds A.

Exact in every round, for the other factor is the same at all clients. Half the uplink. The downlink
carries both factors: a client that was not sampled in the round before has neither.
"""

from fedlpp_ray.aggregation.methods.base import Method, Parts


def _trained(round: int) -> Parts:
    return frozenset({"B", "head"}) if round % 2 else frozenset({"A", "head"})


ROLORA = Method(trained=_trained)
