"""FedSA-LoRA (Guo et al., 2024, arXiv 2410.01463): A is shared, B stays with its client.

    A <- sum_i p_i A_i

The server has no B, so it has no model of its own to evaluate; each client has its own.
"""

from fedlpp_ray.aggregation.methods.base import Method

FEDSA_LORA = Method(travels=frozenset({"A", "head"}), personal=frozenset({"B"}))
