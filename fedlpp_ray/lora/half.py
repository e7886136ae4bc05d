"""The frozen part of an adapted model in half the memory."""

from __future__ import annotations

import hashlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedlpp_ray.cache import Tensors, share

KIND, VERSION = "halves", 1
"""Folder in the cache, and the version of what is written there. Raise it with every change."""


def store_in_bf16(model: nn.Module) -> nn.Module:
    """Round what is frozen to bf16, in place; what is trained stays fp32, and so do packed scales.

    On a CPU all processes of a node that have the same weights map one copy of them (`cache`).
    bitsandbytes' layers dequantize to bf16 from now on. The model is to be used under autocast
    (`training.computing`).

    Args:
        model: With its adapter, whose first values are the same as in fp32.
    """
    frozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not parameter.requires_grad
    }
    for name, half in _halves({name: p.detach() for name, p in frozen.items()}).items():
        frozen[name].data = half
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # its input is to stay bf16, which A is cast to
            layer.cast_input_dtype_enabled = False
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    return model


def _halves(tensors: Tensors) -> Tensors:
    def make() -> Tensors:
        return {name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}

    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return make()
    return share(KIND, {"version": VERSION, "tensors": _digest(tensors)}, make)


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
