"""How client returns become the server's next state."""

from fedlpp_ray.aggregation.exact import ExactMean, ExactSum
from fedlpp_ray.aggregation.fold import RoundSum
from fedlpp_ray.aggregation.mean import weighted_mean
from fedlpp_ray.aggregation.methods import METHODS, Method, Return, Target, find_method
from fedlpp_ray.aggregation.optimizers import OptimizerName, ServerOptimizer, make_optimizer
from fedlpp_ray.aggregation.plan import Plan
from fedlpp_ray.aggregation.robust import ROBUST, RobustRule, find_robust, robustly
from fedlpp_ray.aggregation.rules import RULES, ServerRule, next_state

__all__ = [
    "METHODS",
    "ROBUST",
    "RULES",
    "ExactMean",
    "ExactSum",
    "Method",
    "OptimizerName",
    "Plan",
    "Return",
    "RobustRule",
    "RoundSum",
    "ServerOptimizer",
    "ServerRule",
    "Target",
    "find_method",
    "find_robust",
    "make_optimizer",
    "next_state",
    "robustly",
    "weighted_mean",
]
