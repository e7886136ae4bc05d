"""Pretrained models, and the client's base: full precision, packed, or bitsandbytes."""

from fedlpp_ray.models.base import check_base, quantize_base
from fedlpp_ray.models.bnb import BaseFormatError
from fedlpp_ray.models.correction import Correction
from fedlpp_ray.models.decoding import no_repeat
from fedlpp_ray.models.emulator import (
    emulated_layers,
    emulator_bytes,
    load_emulator,
    make_emulator,
)
from fedlpp_ray.models.head import head_modules, modules_named, within
from fedlpp_ray.models.layers import LayersError, outer_layers, trained_modules
from fedlpp_ray.models.linear import FrozenLinear
from fedlpp_ray.models.loading import (
    check_text,
    load_classifier,
    load_generator,
    load_tokenizer,
    model_identity,
)
from fedlpp_ray.models.memory import (
    activation_bytes,
    cache_bytes,
    correction_bytes,
    layer_bytes,
    logits_bytes,
    quantized_bytes,
    unpacked_bytes,
    weight_bytes,
)
from fedlpp_ray.models.outline import load_outline
from fedlpp_ray.models.packed import PackedLinear
from fedlpp_ray.models.sharded import check_zero, gathered, is_sharded, load_deepspeed, shard
from fedlpp_ray.models.shared import Base, share_base
from fedlpp_ray.models.streamed import BaseParts, receive_base

__all__ = [
    "Base",
    "BaseFormatError",
    "BaseParts",
    "Correction",
    "FrozenLinear",
    "LayersError",
    "PackedLinear",
    "activation_bytes",
    "cache_bytes",
    "check_base",
    "check_text",
    "check_zero",
    "correction_bytes",
    "emulated_layers",
    "emulator_bytes",
    "gathered",
    "head_modules",
    "is_sharded",
    "layer_bytes",
    "load_classifier",
    "load_deepspeed",
    "load_emulator",
    "load_generator",
    "load_outline",
    "load_tokenizer",
    "logits_bytes",
    "make_emulator",
    "model_identity",
    "modules_named",
    "no_repeat",
    "outer_layers",
    "quantize_base",
    "quantized_bytes",
    "receive_base",
    "shard",
    "share_base",
    "trained_modules",
    "unpacked_bytes",
    "weight_bytes",
    "within",
]
