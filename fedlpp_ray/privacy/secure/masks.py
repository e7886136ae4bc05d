"""The masks, as the client that adds them and the server that takes them away compute them."""

from __future__ import annotations

import numpy as np

from fedlpp_ray.privacy.secure import primitives
from fedlpp_ray.privacy.secure.primitives import Vector
from fedlpp_ray.privacy.secure.session import Session


def mask_key(secret: bytes) -> bytes:
    """The private X25519 key of a client's pairwise masks, from its shared secret."""
    return primitives.derive(secret, "mask key")


def own_mask(session: Session, bound: str, secret: bytes) -> Vector:
    """A client's own mask, (length,).

    Args:
        session: The aggregation.
        bound: Its digest with the roster.
        secret: The client's.
    """
    key = primitives.derive(secret, "own mask", bound)
    return primitives.keystream(key, session.length, session.dtype)


def pair_mask(
    session: Session, bound: str, private: bytes, public: bytes, ends: tuple[int, int]
) -> Vector:
    """What the first of two clients adds for the second, (length,): minus what that one adds.

    Args:
        session: The aggregation.
        bound: Its digest with the roster.
        private: Mask key of either.
        public: Mask key of the other.
        ends: Both, first the one whose mask this is.

    Raises:
        MessageError: the public key is none.
    """
    secret = primitives.agree(private, public)
    key = primitives.derive(secret, "pair mask", bound, *sorted(ends))
    mask = primitives.keystream(key, session.length, session.dtype)
    return mask if ends[0] < ends[1] else np.negative(mask)
