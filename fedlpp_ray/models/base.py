"""The client's base: W0 as it is, or quantized in one of two formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.config import FULL_PRECISION, ClientConfig
from fedlpp_ray.models import bnb
from fedlpp_ray.models.head import head_modules, modules_named, within
from fedlpp_ray.models.linear import FrozenLinear
from fedlpp_ray.models.packed import PackedLinear
from fedlpp_ray.quantization import Quantizer


def check_base(model: nn.Module, config: ClientConfig, modules_to_save: Sequence[str] = ()) -> None:
    """Refuse a format that cannot store this model; its weights are not needed.

    Args:
        model: The model, or its outline.
        config: `base_bits` and the keys beside it.
        modules_to_save: As `quantize_base`.

    Raises:
        BaseFormatError: bitsandbytes is not installed, or cannot store a layer of this width.
    """
    if config.base_bits != FULL_PRECISION and config.base_format == "bitsandbytes":
        bnb.check(linears(model, modules_to_save), config.base_bits)


def quantize_base(
    model: nn.Module, config: ClientConfig, modules_to_save: Sequence[str] = ()
) -> nn.Module:
    """Replace the backbone's linear layers by quantized ones, in place.

    Embeddings, norms, biases and the head keep full precision, as in QLoRA; where the head is tied
    to the embeddings, both still hold one tensor. So does what is trained whole. GPT-2's Conv1D
    becomes the `nn.Linear` that computes the same, so that its blocks run along the inputs of one
    output, as everywhere else.

    Args:
        model: A frozen model as it is loaded, without adapters; or its outline, of which packed
            formats make the outline of the quantized model.
        config: `base_bits` and the keys beside it. 32 bits changes nothing.
        modules_to_save: Names of modules that will be trained whole, as in `lora.modules_to_save`.

    Raises:
        BaseFormatError: as `check_base`.
    """
    check_base(model, config, modules_to_save)
    if config.base_bits == FULL_PRECISION:
        return model
    for name, linear in linears(model, modules_to_save).items():
        model.set_submodule(name, quantize_layer(linear, config))
    if config.base_format == "bitsandbytes":
        bnb.mark_quantized(model, config.base_bits)
    return model


def quantize_layer(linear: nn.Linear, config: ClientConfig) -> nn.Module:
    """A linear layer in a base's format, or the layer itself at 32 bits.

    Args:
        linear: One of `linears`; it is not changed.
        config: `base_bits` and the keys beside it.
    """
    if config.base_bits == FULL_PRECISION:
        return linear
    if config.base_format == "bitsandbytes":
        double = config.base_scale == "double"
        return bnb.quantize_linear(linear, config.base_bits, double=double)
    quantizer = Quantizer(config.base_bits, config.base_kind, config.base_block, config.base_scale)
    if not config.dequantize_at_load:
        return PackedLinear(linear, quantizer)
    dense = FrozenLinear(linear.in_features, linear.out_features, device="meta")
    dense.weight = nn.Parameter(_dequantized(linear.weight, quantizer), requires_grad=False)
    dense.bias = linear.bias
    return dense


def _dequantized(weight: Tensor, quantizer: Quantizer) -> Tensor:
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return quantizer.quantize(weight).dequantize()


def linears(model: nn.Module, modules_to_save: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers to quantize by name; a Conv1D as a linear layer that shares its tensors.

    Args:
        model: As `quantize_base`; or its outline.
        modules_to_save: As `quantize_base`.
    """
    kept = [*head_modules(model), *modules_named(model, modules_to_save)]
    return {
        name: as_linear(module) if isinstance(module, Conv1D) else module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not within(name, kept)
    }


def as_linear(layer: Conv1D) -> nn.Linear:
    """y = x W + b with W (in, out) as y = x (W^T)^T + b: the weight is the view W^T (out, in)."""
    linear = FrozenLinear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t(), requires_grad=False)
    linear.bias = layer.bias
    return linear
