"""Bytes of a model from its outline: weights in the base's format, activations, logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedlpp_ray.config import FULL_PRECISION, ClientConfig
from fedlpp_ray.models.base import linears
from fedlpp_ray.models.emulator import PassThrough

FP32 = 4
"""Bytes of a number in full precision, in which all is computed."""
_SCALE_BITS = {"fp32": 32, "fp16": 16, "double": 8}
_LOGITS = 4
"""Tensors of the logits' shape at once in training: logits, their logarithmic softmax, and the
gradient of each."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in fp32, each counted once; what is tied is one."""
    return FP32 * sum(parameter.numel() for parameter in model.parameters())


def quantized_bytes(
    model: nn.Module, config: ClientConfig, modules_to_save: Sequence[str] = ()
) -> tuple[int, int]:
    """Bytes of the layers that `quantize_base` replaces: in fp32, and in the base's format.

    A weight takes `base_bits`, and its block's scale 32, 16 or, `double`, 8 bits; bitsandbytes'
    int8 has a scale a row, which is not counted. With `dequantize_at_load` it takes 32. Layers that
    share a weight in fp32 (an emulator's) have one each once they are quantized.

    Args:
        model: The base's outline, without adapters.
        config: As `quantize_base`.
        modules_to_save: As `quantize_base`.

    Returns:
        (0, 0) where nothing is quantized.
    """
    if config.base_bits == FULL_PRECISION:
        return 0, 0
    layers = linears(model, modules_to_save)
    weights = sum(layer.weight.numel() for layer in layers.values())
    shared = {id(p): p for p in (model.get_submodule(name).weight for name in layers)}
    dense = FP32 * sum(parameter.numel() for parameter in shared.values())  # type: ignore[operator, misc]
    if config.dequantize_at_load:
        return dense, FP32 * weights
    per_row = config.base_format == "bitsandbytes" and config.base_bits == 8
    scale = 0.0 if per_row else _SCALE_BITS[config.base_scale] / config.base_block
    return dense, round(weights * (config.base_bits + scale) / 8)


def unpacked_bytes(
    model: nn.Module, config: ClientConfig, modules_to_save: Sequence[str] = ()
) -> int:
    """Bytes in fp32 of the layers that are kept packed: what they take while they are dequantized.

    Args:
        model, config, modules_to_save: As `quantized_bytes`.

    Returns:
        0 where none is packed.
    """
    full = config.base_bits == FULL_PRECISION
    if full or config.base_format != "packed" or config.dequantize_at_load:
        return 0
    return FP32 * sum(x.weight.numel() for x in linears(model, modules_to_save).values())


def correction_bytes(
    model: nn.Module, rank: int, modules_to_save: Sequence[str] = ()
) -> tuple[int, int]:
    """Bytes of a `Correction`: of R itself, and of the weights that hold it while it is applied.

    Args:
        model, modules_to_save: As `quantized_bytes`.
        rank: k; 0: there is none.
    """
    if not rank:
        return 0, 0
    shapes = [layer.weight.shape for layer in linears(model, modules_to_save).values()]
    kept = sum(min(rank, *shape) * sum(shape) for shape in shapes)
    return FP32 * kept, FP32 * sum(shape.numel() for shape in shapes)


def activation_bytes(model: nn.Module, rows: int, tokens: int) -> int:
    """Activations that one forward pass keeps for the backward pass of LoRA on a frozen base.

    rows * tokens * layers * 4 bytes * (6 h + 3 i + 3 a t) with hidden width h, inner width i, and,
    where attention has dropout, a heads over t tokens, whose probabilities are then kept three
    times. The terms are those of Korthikanti et al. (arXiv 2205.05198, section 4.1), less the
    inputs of frozen linear layers; their factors bound what was counted in BERT, which keeps
    4 h + 2 i + 3 a t, and in Llama, which keeps 5.7 h + 3 i.

    Args:
        model: Its outline, or itself.
        rows: Texts in a batch.
        tokens: Length of each.
    """
    dropped = sum(isinstance(module, PassThrough) for module in model.modules())
    layers = model.config.num_hidden_layers - dropped  # type: ignore[union-attr, operator]
    return int(layers) * layer_bytes(model, rows, tokens)


def layer_bytes(model: nn.Module, rows: int, tokens: int) -> int:
    """One layer's share of `activation_bytes`: what evaluation has at a time."""
    config: Any = model.config
    hidden = config.hidden_size
    kept = 6 * hidden + 3 * _inner(config)
    if any(getattr(config, key, 0) for key in _ATTENTION_DROPOUT):
        kept += 3 * config.num_attention_heads * tokens
    return int(rows * tokens * FP32 * kept)


_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_INNER = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")


def _inner(config: Any) -> int:
    """Inner width of the feed-forward layers; four times the hidden one where none is named."""
    named = (getattr(config, key, None) for key in _INNER)
    return next((int(width) for width in named if width), 4 * int(config.hidden_size))


def logits_bytes(model: nn.Module, rows: int, tokens: int) -> int:
    """Logits of a generator over its vocabulary, in the copies of a loss; 0 of a classifier.

    4 * rows * tokens * vocabulary * 4 bytes.
    """
    if not model.can_generate():  # type: ignore[operator]
        return 0
    return _LOGITS * FP32 * rows * tokens * int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]


def cache_bytes(model: nn.Module, rows: int, tokens: int) -> int:
    """Keys and values of a search over `rows` texts, and their copy when beams are reordered.

    2 * 2 * layers * rows * tokens * key-value width * 4 bytes.
    """
    config: Any = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(4 * FP32 * config.num_hidden_layers * rows * tokens * kept * width)
