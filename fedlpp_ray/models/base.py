"""The client's base: W0 as it is, or quantized in one of two formats."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fedlpp_ray.config import FULL_PRECISION, ClientConfig
from fedlpp_ray.models.packed import PackedLinear
from fedlpp_ray.quantization import Quantizer

HEADS = ("classifier", "score", "lm_head")
"""Output layers. They are trained or tied to the embedding, so they stay in full precision."""


def quantize_base(model: nn.Module, config: ClientConfig) -> nn.Module:
    """Replace the backbone's linear layers by quantized ones, in place.

    Embeddings, norms, biases and the output layer keep full precision, as in QLoRA.

    Args:
        model: A frozen model as `load_classifier` returns it, without adapters.
        config: `base_bits` and the keys beside it. 32 bits changes nothing.

    Raises:
        ValueError: bitsandbytes cannot store a layer of this width; the message names it.
        ImportError: bitsandbytes is asked for and not installed.
    """
    if config.base_bits == FULL_PRECISION:
        return model
    if config.base_format == "bitsandbytes":
        from fedlpp_ray.models import bnb

        bnb.check_widths(dict(_linears(model)), config)
        for name, linear in _linears(model):
            model.set_submodule(name, bnb.quantize_linear(linear, config))
        return bnb.mark_quantized(model, config)
    quantizer = Quantizer(
        config.base_bits, config.base_kind, config.base_block, config.base_scale
    )
    for name, linear in _linears(model):
        if config.dequantize_at_load:
            dense = quantizer.quantize(linear.weight.detach()).dequantize()
            linear.weight = nn.Parameter(dense, requires_grad=False)
        else:
            model.set_submodule(name, PackedLinear(linear, quantizer))
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not set(name.split(".")) & set(HEADS):
            yield name, module
