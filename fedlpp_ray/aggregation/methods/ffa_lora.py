"""FFA-LoRA (Sun et al., 2024, arXiv 2403.12313): A stays at its initial value, B is averaged.

    B <- sum_i p_i B_i

Exact: sum_i p_i B_i A = (sum_i p_i B_i) A. Half the bytes, for A never travels. Every client knows
A from the experiment's seed.
"""

from fedlpp_ray.aggregation.methods.base import Method, always

FFA_LORA = Method(travels=frozenset({"B", "head"}), trained=always("B", "head"))
