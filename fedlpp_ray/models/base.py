"""The client's base: W0 as it is, or quantized in one of two formats."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.config import FULL_PRECISION, ClientConfig
from fedlpp_ray.models import bnb
from fedlpp_ray.models.bnb import BaseFormatError
from fedlpp_ray.models.head import head_modules
from fedlpp_ray.models.packed import PackedLinear
from fedlpp_ray.quantization import Quantizer


def check_base(model: nn.Module, config: ClientConfig) -> None:
    """Refuse a format that cannot store this model; its weights are not needed.

    Raises:
        BaseFormatError: the layers are not linear layers; or bitsandbytes is not installed, or
            cannot store a layer of this width.
    """
    if config.base_bits == FULL_PRECISION:
        return
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise BaseFormatError(
            "client.base_bits: this model's layers are Conv1D (GPT-2), which no base format "
            "stores; allowed here: 32"
        )
    if config.base_format == "bitsandbytes":
        bnb.check(_linears(model), config.base_bits)


def quantize_base(model: nn.Module, config: ClientConfig) -> nn.Module:
    """Replace the backbone's linear layers by quantized ones, in place.

    Embeddings, norms, biases and the head keep full precision, as in QLoRA.

    Args:
        model: A frozen model as `load_classifier` returns it, without adapters.
        config: `base_bits` and the keys beside it. 32 bits changes nothing.

    Raises:
        BaseFormatError: as `check_base`.
    """
    check_base(model, config)
    if config.base_bits == FULL_PRECISION:
        return model
    if config.base_format == "bitsandbytes":
        double = config.base_scale == "double"
        for name, linear in _linears(model).items():
            quantized = bnb.quantize_linear(linear, config.base_bits, double=double)
            model.set_submodule(name, quantized)
        return bnb.mark_quantized(model, config.base_bits)
    quantizer = Quantizer(config.base_bits, config.base_kind, config.base_block, config.base_scale)
    for name, linear in _linears(model).items():
        if config.dequantize_at_load:
            dense = quantizer.quantize(linear.weight).dequantize()
            linear.weight = nn.Parameter(dense, requires_grad=False)
        else:
            model.set_submodule(name, PackedLinear(linear, quantizer))
    return model


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The backbone's linear layers by name."""
    head = head_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] not in head
    }
