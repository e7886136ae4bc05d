"""Blockwise quantization of tensors to 1.6-8 bits a weight: codebooks, rounding, exact packing.

    quantizer = Quantizer(bits=4, kind="nf", block=64, scale="fp16")
    received = quantizer.quantize(weights)         # packed; received.tensors() is what to send
    weights_again = received.dequantize()

Every result is the same whatever the number of threads. This package needs torch alone.
"""

from fedlpp_ray.quantization.blockwise import QuantizedTensor, Quantizer, Rounding
from fedlpp_ray.quantization.codebooks import Bits, Kind, codebook
from fedlpp_ray.quantization.guard import UNGUARDED, Guard, Magnitude, draw
from fedlpp_ray.quantization.packing import pack, packed_bytes, unpack
from fedlpp_ray.quantization.scales import Scale

__all__ = [
    "UNGUARDED",
    "Bits",
    "Guard",
    "Kind",
    "Magnitude",
    "QuantizedTensor",
    "Quantizer",
    "Rounding",
    "Scale",
    "codebook",
    "draw",
    "pack",
    "packed_bytes",
    "unpack",
]
