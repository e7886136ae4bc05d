"""What a receiver checks before it uses a message, cheapest first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlpp_ray.errors import UserError

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Expected dtype and shape of every tensor of a message."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_HEADER_BYTES_PER_TENSOR = 1024
_HEADER_BYTES = 4096


class MessageError(UserError):
    """A received message is not what was expected; it must not be used."""


def read_header(payload: bytes, parts: Parts) -> Any:
    """Check size, names, dtypes and shapes, and return the message's own header.

    Raises:
        MessageError: naming the first thing that is wrong.
    """
    data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts.values())
    header_limit = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(parts)
    if len(payload) > data + header_limit:
        raise MessageError(f"{len(payload)} bytes; at most {data + header_limit} are expected")
    if len(payload) < 8:
        raise MessageError(f"{len(payload)} bytes are too few for a message")
    length = int.from_bytes(payload[:8], "little")
    if length > min(header_limit, len(payload) - 8):
        raise MessageError(f"a header of {length} bytes; at most {header_limit} are expected")
    try:
        listing = json.loads(payload[8 : 8 + length])
        header = json.loads(listing.pop("__metadata__")["fedlpp"])
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in listing.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"no readable header: {error!r}") from None
    expected = {name: (_DTYPES[dtype], shape) for name, (dtype, shape) in parts.items()}
    if found.keys() != expected.keys():
        different = sorted(found.keys() ^ expected.keys())
        raise MessageError(f"missing or unexpected tensors: {', '.join(different[:5])}")
    for name, entry in expected.items():
        if found[name] != entry:
            raise MessageError(f"{name}: dtype and shape are {found[name]}, expected {entry}")
    return header


def check_header(header: Any, expected: Mapping[str, Any]) -> None:
    """Compare format version, kind, round, sender, quantizer and schema.

    Raises:
        MessageError: naming the first field that differs.
    """
    if not isinstance(header, dict) or header.keys() != expected.keys():
        raise MessageError(f"the header's fields are not {', '.join(expected)}")
    for field, value in expected.items():
        if header[field] != value:
            raise MessageError(f"{field} is {header[field]!r}, expected {value!r}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        MessageError: naming the tensor.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise MessageError(f"{name}: holds NaN or infinity")


def check_norm(state: Mapping[str, Tensor], limit: float) -> None:
    """Refuse a state whose L2 norm over all tensors is above `limit`.

    Raises:
        MessageError: naming the norm and the limit.
    """
    squares = sum(float(tensor.double().square().sum()) for tensor in state.values())
    if math.sqrt(squares) > limit:
        raise MessageError(f"its norm is {math.sqrt(squares):.4g}, allowed is {limit:.4g}")
