"""What crosses the wire: the broadcast and the update, as safetensors bytes."""

from fedlpp_ray.messages.checks import MessageError
from fedlpp_ray.messages.codec import Codec, Envelope, decode, encode, quantized
from fedlpp_ray.messages.ledger import Transfer, total_bytes

__all__ = [
    "Codec",
    "Envelope",
    "MessageError",
    "Transfer",
    "decode",
    "encode",
    "quantized",
    "total_bytes",
]
