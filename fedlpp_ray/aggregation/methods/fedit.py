"""FedIT (Zhang et al., 2023, arXiv 2305.05644): A and B are averaged separately.

    A <- sum_i p_i A_i,  B <- sum_i p_i B_i

The mean of products is not the product of means, so it is not exact; it is what FedLPP quantizes.
"""

from fedlpp_ray.aggregation.methods.base import Method

FEDIT = Method()
