"""Pretrained models, and the client's base: full precision, packed, or bitsandbytes."""

from fedlpp_ray.models.base import quantize_base
from fedlpp_ray.models.loading import load_classifier, load_tokenizer
from fedlpp_ray.models.packed import PackedLinear

__all__ = ["PackedLinear", "load_classifier", "load_tokenizer", "quantize_base"]
