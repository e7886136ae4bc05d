"""4- and 8-bit bases through bitsandbytes, with its CPU traps closed.

bitsandbytes 0.50 on a CPU with AVX512-BF16 repacks a 4-bit weight at the first evaluation for a
kernel that has no gradient, and never unpacks it: training after evaluation is then silently wrong.
It also dequantizes wrongly, without an error, where a row is not a whole number of blocks.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedlpp_ray.errors import UserError

BLOCK = 64


class BaseFormatError(UserError):
    """The model cannot be stored in this format."""


def check(linears: Mapping[str, nn.Linear], bits: int) -> None:
    """Refuse a missing bitsandbytes, and widths that its 4-bit CPU code dequantizes wrongly.

    Raises:
        BaseFormatError: naming the package, or every layer whose input width is not a multiple of
            the block.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseFormatError(
            "client.base_format 'bitsandbytes' needs: pip install 'fedlpp_ray[bitsandbytes]'"
        )
    odd = [f"{name} ({x.in_features})" for name, x in linears.items() if x.in_features % BLOCK]
    if bits == 4 and odd:
        raise BaseFormatError(
            f"client.base_format 'bitsandbytes' at 4 bits needs input widths that are multiples of "
            f"{BLOCK}; these layers are not: {', '.join(odd)}. 'packed' takes any width"
        )


def quantize_linear(linear: nn.Linear, bits: int, *, double: bool) -> nn.Module:
    """The layer as bitsandbytes' nf4 (4 bits) or int8 (8 bits), on the layer's device.

    Args:
        linear: The layer; it is not changed.
        bits: 4 or 8.
        double: Whether nf4's scales are quantized too.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    from bitsandbytes import nn as bnb

    shape = (linear.in_features, linear.out_features)
    has_bias = linear.bias is not None
    # From the CPU: int8 is made on the way to a device, not of weights that are there already.
    weight = linear.weight.detach().to("cpu", copy=True)
    quantized: Any
    if bits == 4:
        quantized = bnb.Linear4bit(*shape, bias=has_bias, compute_dtype=torch.float32)
        quantized.weight = bnb.Params4bit(
            weight,
            requires_grad=False,
            quant_type="nf4",
            blocksize=BLOCK,
            compress_statistics=double,
        )
        # The first trap: never take the inference-only kernel.
        quantized.support_avx512bf16_for_cpu = False
    else:
        quantized = bnb.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
        quantized.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantized.bias = linear.bias
    return quantized.to(linear.weight.device)  # type: ignore[no-any-return]


def mark_quantized(model: nn.Module, bits: int) -> nn.Module:
    """Set the flag by which PEFT chooses its bitsandbytes LoRA layers."""
    flag = "is_loaded_in_4bit" if bits == 4 else "is_loaded_in_8bit"
    setattr(model, flag, True)
    return model
