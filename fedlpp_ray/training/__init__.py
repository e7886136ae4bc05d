"""Local training and evaluation on one device. No Ray."""

from fedlpp_ray.training.device import configure_torch
from fedlpp_ray.training.evaluation import evaluate
from fedlpp_ray.training.local import train_locally

__all__ = ["configure_torch", "evaluate", "train_locally"]
