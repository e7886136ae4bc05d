"""What a receiver checks before it uses a message, cheapest first."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlpp_ray.cache import TYPE_NAMES
from fedlpp_ray.errors import UserError

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Expected dtype and shape of every tensor of a message."""

_HEADER_BYTES_PER_TENSOR = 1024
_HEADER_BYTES = 4096
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


class MessageError(UserError):
    """A received message is not what was expected; it must not be used."""


def read_header(payload: Any, parts: Parts) -> Any:
    """Check size, names, dtypes and shapes, and return the message's own header.

    Raises:
        MessageError: naming the first thing that is wrong.
    """
    listing, header = read_listing(payload, parts)
    check_listing(listing, parts)
    return header


def read_listing(payload: Any, largest: Parts) -> tuple[dict[str, Any], Any]:
    """Check the size, and return what the message says of its tensors, and its own header.

    Args:
        payload: Anything; a message is bytes.
        largest: Every tensor that the largest message could have.

    Raises:
        MessageError: naming the first thing that is wrong.
    """
    if not isinstance(payload, bytes):
        raise MessageError(f"a {type(payload).__name__} is no message; bytes are")
    data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in largest.values())
    header_limit = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(largest)
    if len(payload) > data + header_limit:
        raise MessageError(f"{len(payload)} bytes; at most {data + header_limit} are expected")
    if len(payload) < 8:
        raise MessageError(f"{len(payload)} bytes are too few for a message")
    length = int.from_bytes(payload[:8], "little")
    if length > min(header_limit, len(payload) - 8):
        raise MessageError(f"a header of {length} bytes; at most {header_limit} are expected")
    try:
        listing = _read_json(payload[8 : 8 + length].decode())
        return listing, _read_json(listing.pop("__metadata__")["fedlpp"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"no readable header: {brief(error)}") from None


def check_listing(listing: Mapping[str, Any], parts: Parts) -> None:
    """Compare names, dtypes and shapes with those expected.

    Raises:
        MessageError: naming the first thing that is wrong.
    """
    if listing.keys() != parts.keys():
        different = sorted(listing.keys() ^ parts.keys())[:5]
        names = ", ".join(name if name in parts else brief(name) for name in different)
        raise MessageError(f"missing or unexpected tensors: {names}")
    for name, (dtype, shape) in parts.items():
        entry, expected = listing[name], {"dtype": TYPE_NAMES[dtype], "shape": list(shape)}
        found = {k: entry.get(k) for k in expected} if isinstance(entry, dict) else entry
        if not _same(found, expected):
            raise MessageError(
                f"{name}: dtype and shape are {brief(found)}, expected {TYPE_NAMES[dtype]}, {shape}"
            )


def check_tensors(tensors: Mapping[str, Tensor], parts: Parts) -> None:
    """Compare what has been read with what is expected, whatever its header said.

    Raises:
        MessageError: they differ.
    """
    if {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} != parts:
        raise MessageError("the tensors are not those of the header")


def check_header(header: Any, expected: Mapping[str, Any]) -> None:
    """Compare format version, kind, round, sender, quantizer and schema.

    Raises:
        MessageError: naming the first field that differs.
    """
    if not isinstance(header, dict) or header.keys() != expected.keys():
        raise MessageError(f"the header's fields are not {', '.join(expected)}")
    for field, value in expected.items():
        if not _same(header[field], value):
            raise MessageError(f"{field} is {brief(header[field])}, expected {value!r}")


def _same(found: Any, expected: Any) -> bool:
    """Equality of JSON values in which 1, 1.0 and true are three; no deeper than expected."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return bool(found == expected)


def _read_json(text: str) -> Any:
    """A JSON value in which no object has a key twice: parsers differ in which one counts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def brief(value: Any) -> str:
    """What a sender wrote, on one line of bounded length and depth."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a huge {type(value).__name__}"


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        MessageError: naming the tensor.
    """
    if not tensor.numel():
        return
    extremes = torch.aminmax(tensor)  # NaN if there is one; much faster than torch.isfinite
    if not all(math.isfinite(extreme) for extreme in extremes):
        raise MessageError(f"{name}: holds NaN or infinity")


def check_norm(state: Mapping[str, Tensor], limit: float) -> None:
    """Refuse a state of floating-point tensors whose L2 norm over all of them is above `limit`.

    Raises:
        MessageError: naming the norm and the limit.
    """
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in state.values()]
    norm = math.hypot(*map(float, norms))
    if norm > limit:
        raise MessageError(f"its norm is {norm:.4g}, allowed is {limit:.4g}")
