"""The frozen part of an adapted model in half the memory."""

from __future__ import annotations

import hashlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedlpp_ray.cache import Tensors, mapped_ranges, share

KIND, VERSION = "halves", 1
"""Folder in the cache, and the version of what is written there. Raise it with every change."""


def store_in_bf16(model: nn.Module) -> nn.Module:
    """Round what is frozen to bf16, in place; what is trained stays fp32, and so do packed scales.

    Of what is mapped from a file (`share_base`), all processes of a node map one rounded copy too.
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
    ranges = mapped_ranges()
    mapped = {
        name: parameter.detach()
        for name, parameter in frozen.items()
        if any(first <= parameter.data_ptr() < last for first, last in ranges)
    }
    shared = _shared(mapped) if mapped else {}
    for name, parameter in frozen.items():
        parameter.data = shared[name] if name in shared else parameter.data.to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # its input is to stay bf16, which A is cast to
            layer.cast_input_dtype_enabled = False
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    return model


def _shared(tensors: Tensors) -> Tensors:
    """Their copies in bf16, mapped from a file of the cache."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    content = {"version": VERSION, "tensors": digest.hexdigest()}
    half = torch.bfloat16
    return share(KIND, content, lambda: {n: t.to(half).contiguous() for n, t in tensors.items()})
