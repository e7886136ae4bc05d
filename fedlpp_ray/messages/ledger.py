"""The byte ledger: what each client of a round really received and sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KEY_BYTES = 32
"""Of the key from which the draws of every broadcast's dither follow, where clients subtract it."""


@dataclass(frozen=True)
class Transfer:
    """One client's traffic in one round, in bytes: the `len()` of whole messages.

    Attributes:
        client: Which client.
        down: Bytes of the broadcast that it received, 0 where it already had it; in the first round
            that it takes part in, those of the emulator too, where clients have one
            (`emulator.kind`), and `KEY_BYTES` for a dither that it subtracts. W0 itself is not
            counted: clients that have it are taken to have had it before. With secure aggregation,
            also what the server sends of its protocol.
        up: Bytes of the update that it returned; with secure aggregation, of all four steps.
    """

    client: int
    down: int
    up: int


def total_bytes(ledger: Iterable[Transfer]) -> dict[str, int]:
    """`{"down": ..., "up": ...}` over all transfers."""
    transfers = list(ledger)
    return {"down": sum(t.down for t in transfers), "up": sum(t.up for t in transfers)}
