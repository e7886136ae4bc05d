"""The cryptography against published vectors and the standard library; the masks' symmetry."""

from __future__ import annotations

import hashlib
import hmac
import itertools

import numpy as np
import pytest

from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import primitives
from fedlpp_ray.privacy.secure.masks import mask_key, own_mask, pair_mask
from tests.privacy.sessions import seeded, session_of

ALICE, ALICE_PUBLIC, BOB, BOB_PUBLIC, BOTH = map(
    bytes.fromhex,
    (  # RFC 7748, section 6.1
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    ),
)
ZEROS_STREAM = bytes.fromhex(  # RFC 8439, appendix A.1, vector 1
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
BOUND = "0" * 64


def test_key_agreement_is_that_of_the_rfc() -> None:
    assert primitives.public_key(ALICE) == ALICE_PUBLIC
    assert primitives.public_key(BOB) == BOB_PUBLIC
    assert primitives.agree(ALICE, BOB_PUBLIC) == primitives.agree(BOB, ALICE_PUBLIC) == BOTH


@pytest.mark.parametrize("public", [bytes(32), bytes([1]) + bytes(31)])
def test_a_key_that_makes_every_secret_zero_is_refused(public: bytes) -> None:
    with pytest.raises(MessageError, match="a public key is none"):
        primitives.agree(ALICE, public)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_the_keystream_is_that_of_the_rfc(dtype: str) -> None:
    found = primitives.keystream(bytes(32), 64 // np.dtype(dtype).itemsize, np.dtype(dtype))
    assert found.tobytes() == ZEROS_STREAM


def test_derived_keys_are_those_of_hkdf() -> None:
    """RFC 5869 with SHA-256, no salt, one block, written with the standard library."""
    key = hmac.digest(bytes(32), b"secret", hashlib.sha256)
    info = b"fedlpp/secure/1/pair mask/x/3"
    expected = hmac.digest(key, info + b"\x01", hashlib.sha256)
    assert primitives.derive(b"secret", "pair mask", "x", 3) == expected


@pytest.mark.parametrize(("threshold", "count"), [(2, 3), (3, 4), (5, 5)])
def test_a_threshold_of_shares_gives_the_secret_and_fewer_do_not(
    threshold: int, count: int
) -> None:
    secret = seeded(0)(16)
    shares = primitives.split(secret, threshold, count)
    assert sorted(shares) == list(range(1, count + 1))
    for size in range(1, threshold + 1):
        for points in itertools.combinations(shares, size):
            found = primitives.combine({point: shares[point] for point in points})
            assert (found == secret) == (size == threshold)


def test_what_is_sealed_opens_under_its_key_only() -> None:
    sealed = primitives.seal(ALICE, b"shares")
    assert len(sealed) == 6 + primitives.TAG
    assert primitives.unseal(ALICE, sealed) == b"shares"
    for key, content in ((BOB, sealed), (ALICE, sealed[:-1] + b"\0"), (ALICE, b"\0" + sealed[1:])):
        with pytest.raises(MessageError, match="damaged or not for this client"):
            primitives.unseal(key, content)


@pytest.mark.parametrize("bits", [32, 64])
def test_what_one_client_adds_for_another_that_one_subtracts(bits: int) -> None:
    session = session_of(3, 2, length=100, bits=bits)
    random_bytes = seeded(0)
    private = {client: mask_key(random_bytes(16)) for client in session.clients}
    public = {client: primitives.public_key(key) for client, key in private.items()}

    def mask(a: int, b: int, bound: str = BOUND) -> np.ndarray:
        return pair_mask(session, bound, private[a], public[b], (a, b))

    for a, b in itertools.combinations(session.clients, 2):
        assert not (mask(a, b) + mask(b, a)).any()
        by_the_server = pair_mask(session, BOUND, private[b], public[a], (a, b))
        assert np.array_equal(by_the_server, mask(a, b))
    masks = [mask(3, 10), mask(3, 17), mask(10, 17), mask(3, 10, "1" * 64)]
    masks += [own_mask(session, bound, ALICE[:16]) for bound in (BOUND, "1" * 64)]
    masks.append(own_mask(session, BOUND, BOB[:16]))
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).mean() > 0.9
