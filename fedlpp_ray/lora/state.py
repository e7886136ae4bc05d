"""Reading and writing the trainable state of a model."""

from __future__ import annotations

import torch
from torch import nn

from fedlpp_ray.state import State

ADAPTER = "default"


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names of PEFT's adapter files."""
    named = {
        name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(named.items()))


def read_state(model: nn.Module) -> State:
    """A copy of the model's trainable tensors."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in _trainable(model).items()
    }


def write_state(model: nn.Module, state: State) -> None:
    """Copy `state` into the model's trainable parameters.

    Raises:
        ValueError: the names differ from the model's.
    """
    parameters = _trainable(model)
    if parameters.keys() != state.keys():
        different = sorted(parameters.keys() ^ state.keys())
        raise ValueError(f"state and model differ in: {', '.join(different)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
