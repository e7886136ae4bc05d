"""What crosses the wire: the broadcast and the update, as safetensors bytes."""

from fedlpp_ray.messages.checks import MessageError
from fedlpp_ray.messages.codec import Codec, Envelope, decode, dither, encode, quantized
from fedlpp_ray.messages.ledger import KEY_BYTES, Transfer, total_bytes

__all__ = [
    "KEY_BYTES",
    "Codec",
    "Envelope",
    "MessageError",
    "Transfer",
    "decode",
    "dither",
    "encode",
    "quantized",
    "total_bytes",
]
