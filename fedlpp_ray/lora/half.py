"""The frozen part of an adapted model in half the memory."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def store_in_bf16(model: nn.Module) -> nn.Module:
    """Round what is frozen to bf16, in place; what is trained stays fp32, and so do packed scales.

    bitsandbytes' layers dequantize to it from now on. The model is to be used under autocast
    (`training.computing`).

    Args:
        model: With its adapter, whose first values are the same as in fp32.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # its input is to stay bf16, which A is cast to
            layer.cast_input_dtype_enabled = False
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    return model
