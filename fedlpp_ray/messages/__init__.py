"""What crosses the wire: the broadcast and the update, as safetensors bytes."""

from fedlpp_ray.messages.codec import Codec, Envelope, MessageError, Schema, decode, encode
from fedlpp_ray.messages.ledger import Transfer, total_bytes

__all__ = [
    "Codec",
    "Envelope",
    "MessageError",
    "Schema",
    "Transfer",
    "decode",
    "encode",
    "total_bytes",
]
