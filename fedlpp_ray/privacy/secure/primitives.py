"""The cryptography that the protocol is made of, all from `pycryptodome`.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 as the generator of masks (RFC 8439),
ChaCha20-Poly1305 for shares, Shamir's sharing over GF(2^128). Every derived key is used once, so
nonces are zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.errors import UserError
from fedlpp_ray.messages import MessageError

RandomBytes = Callable[[int], bytes]
"""So many random bytes, fit for keys."""
Vector = NDArray[np.unsignedinteger]

SECRET = 16
"""Bytes of a secret that is shared, and of each of its shares."""
KEY = 32
TAG = 16
_NONCE = bytes(12)


def check_installed() -> None:
    """Refuse a missing library, before anything is computed.

    Raises:
        UserError: naming the extra.
    """
    try:
        import Crypto.Protocol.DH
        import Crypto.Protocol.SecretSharing  # noqa: F401
    except ImportError:
        raise UserError("secure aggregation needs: pip install 'fedlpp_ray[privacy]'") from None


def derive(secret: bytes, *context: str | int) -> bytes:
    """A key of 32 bytes for one purpose."""
    from Crypto.Hash import SHA256
    from Crypto.Protocol.KDF import HKDF

    info = "/".join(["fedlpp/secure/1", *map(str, context)]).encode()
    return HKDF(secret, KEY, b"", SHA256, context=info)


def commit(secret: bytes) -> bytes:
    """What tells later whether a secret is the same, and nothing of it: a hash of 128 bits."""
    return hashlib.sha256(b"fedlpp/secure/1/commitment/" + secret).digest()


def public_key(private: bytes) -> bytes:
    """The X25519 public key, 32 bytes, of a private one, 32 bytes."""
    from Crypto.Protocol.DH import import_x25519_private_key

    key = import_x25519_private_key(private).public_key()
    return key.export_key(format="raw")


def agree(private: bytes, public: bytes) -> bytes:
    """X25519: what both ends of a pair compute, and nobody else.

    Raises:
        MessageError: what should be a public key is none, or one that makes every secret 0.
    """
    from Crypto.Protocol import DH

    own = DH.import_x25519_private_key(private)
    try:
        peer = DH.import_x25519_public_key(public)
        return DH.key_agreement(eph_priv=own, eph_pub=peer, kdf=bytes)
    except ValueError as error:
        raise MessageError(f"a public key is none: {error}") from None


def keystream(key: bytes, length: int, dtype: np.dtype[np.unsignedinteger]) -> Vector:
    """(length,) of uniform integers, those of ChaCha20 under this key."""
    from Crypto.Cipher import ChaCha20

    stream = ChaCha20.new(key=key, nonce=_NONCE).encrypt(bytes(length * dtype.itemsize))
    return np.frombuffer(stream, dtype)


def seal(key: bytes, content: bytes) -> bytes:
    """ChaCha20-Poly1305; `TAG` bytes longer. One content per key."""
    from Crypto.Cipher import ChaCha20_Poly1305

    sealed, tag = ChaCha20_Poly1305.new(key=key, nonce=_NONCE).encrypt_and_digest(content)
    return sealed + tag


def unseal(key: bytes, sealed: bytes) -> bytes:
    """What `seal` was given.

    Raises:
        MessageError: it is not what was sealed with this key.
    """
    from Crypto.Cipher import ChaCha20_Poly1305

    cipher = ChaCha20_Poly1305.new(key=key, nonce=_NONCE)
    try:
        return cipher.decrypt_and_verify(sealed[:-TAG], sealed[-TAG:])
    except ValueError:
        raise MessageError("encrypted shares are damaged or not for this client") from None


def split(secret: bytes, threshold: int, count: int) -> dict[int, bytes]:
    """Shares of 16 bytes by point, 1 to `count`; fewer than `threshold` tell nothing.

    The library draws the polynomial from the system's random numbers.
    """
    from Crypto.Protocol.SecretSharing import Shamir

    return dict(Shamir.split(threshold, count, secret))


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly as many shares as the threshold."""
    from Crypto.Protocol.SecretSharing import Shamir

    return Shamir.combine(list(shares.items()))
