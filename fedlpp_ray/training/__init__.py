"""Local training and evaluation on one device. No Ray."""

from fedlpp_ray.training.decoding import write
from fedlpp_ray.training.device import (
    compute_dtype,
    computing,
    configure_torch,
    process_peak,
)
from fedlpp_ray.training.distill import distill
from fedlpp_ray.training.evaluation import (
    Evaluator,
    Scored,
    Scorer,
    classification_evaluator,
    classification_scorer,
    generation_evaluator,
    generation_scorer,
    mean_loss,
)
from fedlpp_ray.training.first_inputs import FirstInputs, first_inputs
from fedlpp_ray.training.group import ALONE, Group, dismiss, follow, together
from fedlpp_ray.training.imitate import Imitation, opinions
from fedlpp_ray.training.local import Training
from fedlpp_ray.training.loss import predictions, smoothed_loss
from fedlpp_ray.training.losses import target_losses
from fedlpp_ray.training.rules import (
    ClientRule,
    Descent,
    FedProx,
    Scaffold,
    Schedule,
    Subnetwork,
    client_descent,
    client_rules,
    constant_descent,
    next_server_variate,
    schedule_factor,
    whole_descent,
)

__all__ = [
    "ALONE",
    "ClientRule",
    "Descent",
    "Evaluator",
    "FedProx",
    "FirstInputs",
    "Group",
    "Imitation",
    "Scaffold",
    "Schedule",
    "Scored",
    "Scorer",
    "Subnetwork",
    "Training",
    "classification_evaluator",
    "classification_scorer",
    "client_descent",
    "client_rules",
    "compute_dtype",
    "computing",
    "configure_torch",
    "constant_descent",
    "dismiss",
    "distill",
    "first_inputs",
    "follow",
    "generation_evaluator",
    "generation_scorer",
    "mean_loss",
    "next_server_variate",
    "opinions",
    "predictions",
    "process_peak",
    "schedule_factor",
    "smoothed_loss",
    "target_losses",
    "together",
    "whole_descent",
    "write",
]
