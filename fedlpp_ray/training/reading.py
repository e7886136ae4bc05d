"""A model that is only read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedlpp_ray.lora import merged
from fedlpp_ray.training.device import compute_dtype, computing


@contextmanager
def reading(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without gradients and adapters' branches, in the format that the model computes in."""
    dtype = compute_dtype(model.eval())
    with merged(model, dtype), computing(dtype, device), torch.no_grad():
        yield
