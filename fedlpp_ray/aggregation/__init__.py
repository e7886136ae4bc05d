"""How client returns become the server's next state."""

from fedlpp_ray.aggregation.mean import weighted_mean, weights
from fedlpp_ray.aggregation.rules import RULES, ServerRule, apply_rule

__all__ = ["RULES", "ServerRule", "apply_rule", "weighted_mean", "weights"]
