"""The trainable state of a model: what travels between server and clients."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""Trainable tensors by name, fp32 on the CPU: per adapted layer A (r, d_in) and B (d_out, r), and
the classification head. The names are those of PEFT's adapter files, in sorted order."""

ADAPTER = "default"


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names of PEFT's adapter files."""
    named = {
        name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(named.items()))


def is_head(name: str) -> bool:
    """Whether a state's tensor belongs to the classification head rather than to an adapter."""
    return ".lora_" not in name


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


def state_digest(state: State) -> str:
    """SHA-256 over names and bits: two runs with equal digests hold exactly the same state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
