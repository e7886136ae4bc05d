"""The protocol's messages: safetensors bytes with a header that the receiver checks.

Each carries numbers of clients, ascending, and one row for each: a client's keys or vector, or what
it says of, or is told of, others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from fedlpp_ray.messages import MessageError
from fedlpp_ray.messages.checks import Parts, check_header, check_listing, read_listing
from fedlpp_ray.messages.codec import load
from fedlpp_ray.privacy.secure.primitives import KEY, SECRET, TAG
from fedlpp_ray.privacy.secure.session import Session, Step

FORMAT_VERSION = 1
Kind = Step | Literal["roster", "inbox", "survivors"]
Rows = dict[int, NDArray[Any]]
"""By client, in ascending order."""


@dataclass(frozen=True)
class Heading:
    """What a message is.

    Attributes:
        kind: Which of the protocol's messages.
        round: Of the federation.
        session: Digest of the session; from "shares" on, with the roster.
        client: Who sends it, or to whom the server does.
    """

    kind: Kind
    round: int
    session: str
    client: int


def row_of(kind: Kind, session: Session) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of a row of such a message."""
    if kind == "masked":
        return session.dtype, (session.length,)
    shapes: dict[Kind, tuple[int, ...]] = {
        "keys": (3, KEY),
        "roster": (3, KEY),
        "shares": (2 * SECRET + TAG,),
        "inbox": (2 * SECRET + TAG,),
        "survivors": (0,),
        "unmask": (SECRET,),
    }
    return np.dtype(np.uint8), shapes[kind]


def encode(session: Session, heading: Heading, rows: Mapping[int, Any]) -> bytes:
    """The message that carries `rows`: arrays, or bytes, of what `row_of` says, by client."""
    dtype, shape = row_of(heading.kind, session)
    clients = sorted(rows)
    body = np.empty((len(clients), *shape), dtype)
    for place, client in enumerate(clients):
        row = rows[client]
        body[place] = np.frombuffer(row, dtype).reshape(shape) if isinstance(row, bytes) else row
    if dtype.itemsize > 1:
        body = body.view(f"<i{dtype.itemsize}")  # safetensors: the same bits, signed
    tensors = {"clients": torch.tensor(clients, dtype=torch.int64), "rows": torch.from_numpy(body)}
    header = {"format": FORMAT_VERSION, **asdict(heading), "count": len(clients)}
    header["digest"] = _digest(header, tensors)
    return safetensors.torch.save(tensors, {"fedlpp": json.dumps(header)})


def decode(
    payload: bytes, session: Session, expected: Heading, allowed: Sequence[int], least: int
) -> Rows:
    """The rows that a message carries.

    Args:
        payload: What was received; bytes, if it is a message.
        session: The aggregation.
        expected: The heading that the receiver waits for.
        allowed: Whose rows there may be, ascending.
        least: How many there must be.

    Raises:
        MessageError: kind, round, session, client, clients, types, shapes or digest are not as
            expected. Nothing of the message has been used.
    """
    listing, header = read_listing(payload, _parts(expected.kind, session, len(allowed)))
    given = header if isinstance(header, dict) else {}
    own = {"count": given.get("count"), "digest": given.get("digest")}
    fields = {"format": FORMAT_VERSION, **asdict(expected), **own}
    check_header(header, fields)
    count = own["count"]
    if type(count) is not int or not least <= count <= len(allowed):
        raise MessageError(f"count is {count!r:.50}; {least} to {len(allowed)} clients are allowed")
    parts = _parts(expected.kind, session, count)
    check_listing(listing, parts)
    tensors = load(payload, parts)
    if _digest({k: v for k, v in header.items() if k != "digest"}, tensors) != own["digest"]:
        raise MessageError("its content is not that of its digest: it is damaged")
    clients = tensors["clients"].tolist()
    if clients != sorted(set(clients) & set(allowed)):
        raise MessageError(f"{expected.kind}: clients that are not expected, or not ascending")
    rows = tensors["rows"].numpy().view(row_of(expected.kind, session)[0])
    return dict(zip(clients, rows, strict=True))


def _parts(kind: Kind, session: Session, count: int) -> Parts:
    dtype, shape = row_of(kind, session)
    types = {1: torch.uint8, 4: torch.int32, 8: torch.int64}
    rows = (types[dtype.itemsize], (count, *shape))
    return {"clients": (torch.int64, (count,)), "rows": rows}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over header and tensors: nobody sees from a masked vector that a bit has changed."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in ("clients", "rows"):
        digest.update(tensors[name].numpy().data if tensors[name].numel() else b"")
    return digest.hexdigest()
