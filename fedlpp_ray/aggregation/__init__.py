"""How client returns become the server's next state."""

from fedlpp_ray.aggregation.fold import fold
from fedlpp_ray.aggregation.mean import weighted_mean, weights
from fedlpp_ray.aggregation.methods import METHODS, Method, Return, find_method
from fedlpp_ray.aggregation.optimizers import OptimizerName, ServerOptimizer, make_optimizer
from fedlpp_ray.aggregation.rules import RULES, ServerRule, next_state

__all__ = [
    "METHODS",
    "RULES",
    "Method",
    "OptimizerName",
    "Return",
    "ServerOptimizer",
    "ServerRule",
    "find_method",
    "fold",
    "make_optimizer",
    "next_state",
    "weighted_mean",
    "weights",
]
