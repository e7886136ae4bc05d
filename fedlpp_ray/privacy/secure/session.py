"""What both halves of one secure aggregation agree on beforehand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from fedlpp_ray.errors import UserError

Bits = Literal[32, 64]
Step = Literal["keys", "shares", "masked", "unmask"]
STEPS: tuple[Step, ...] = ("keys", "shares", "masked", "unmask")
"""What clients send, in order."""


class TooFewClientsError(UserError):
    """Fewer clients than the threshold are left: there is no sum, and nothing was unmasked."""


@dataclass(frozen=True)
class Session:
    """One secure aggregation.

    Attributes:
        round: Of the federation.
        clients: The cohort's numbers, ascending; at least 2.
        threshold: How many clients must be left at each step: more than half of the cohort.
        length: Of the vectors.
        bits: Vectors are of integers mod 2^bits.

    Raises:
        UserError: naming the attribute, and what is allowed.
    """

    round: int
    clients: tuple[int, ...]
    threshold: int
    length: int
    bits: Bits = 64

    def __post_init__(self) -> None:
        count = len(self.clients)
        if count < 2 or self.clients != tuple(sorted({abs(client) for client in self.clients})):
            raise UserError("clients: at least 2 different numbers from 0 on, ascending")
        if not count < 2 * self.threshold <= 2 * count:
            raise UserError(
                f"threshold is {self.threshold}; of {count} clients it is from {count // 2 + 1} "
                f"to {count}"
            )
        if self.length < 1:
            raise UserError(f"length is {self.length}; at least 1")
        if self.bits not in (32, 64):
            raise UserError(f"bits is {self.bits}; 32 or 64")

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the vectors: unsigned, little-endian."""
        return np.dtype(f"<u{self.bits // 8}")

    def point(self, client: int) -> int:
        """Where a client's shares are evaluated: 1 for the first of the cohort, and so on."""
        return self.clients.index(client) + 1

    def others(self, client: int) -> tuple[int, ...]:
        """The cohort without one client."""
        return tuple(other for other in self.clients if other != client)

    def digest(self, roster: bytes = b"") -> str:
        """SHA-256 over all of this and, once it is known, the roster of public keys.

        All that is derived and sent afterwards is bound to it, so that nothing of another round,
        or of another attempt at this one, is of use.
        """
        return hashlib.sha256(json.dumps(asdict(self)).encode() + roster).hexdigest()
