"""A run as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlpp_ray.federation.records import Final, RoundRecord
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.storage import StoredBytes


@dataclass(frozen=True)
class Snapshot:
    """A run after its last finished round: all that it goes on from.

    Everything random is derived from the seed and the round, so that no generator is part of it.

    Attributes:
        history: The finished rounds.
        memories: What clients keep, by client.
        broadcasts: Those from which later rounds still train, and of the newest, or of all, what an
            adversary reads (`Watch`), by the round they were made in.
        adapter: The server's state, as files by name. None: as it is made from the seed.
        final: The server's final model, after the last round, if there is one.
    """

    history: tuple[RoundRecord, ...]
    memories: Mapping[int, StoredBytes]
    broadcasts: Mapping[int, Broadcast]
    adapter: Mapping[str, bytes] | None
    final: Final | None = None
