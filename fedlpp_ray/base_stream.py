"""How a client's base comes from the server: part by part, as each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

Identity = Mapping[str, object]


@dataclass(frozen=True)
class BaseStream:
    """The parts of a base, from wherever they are made.

    Attributes:
        identity: All that decides the tensors, as JSON can write it.
        count: Number of parts.
        part: A part by its number: safetensors bytes. Each tensor is in one.
    """

    identity: Identity
    count: int
    part: Callable[[int], bytes]

    @classmethod
    def of(cls, known: tuple[Identity, int] | None, part: Callable[[int], bytes]) -> Self | None:
        """A stream, or None where nothing is known of one."""
        return None if known is None else cls(*known, part)
