"""What the server sent last, where the next broadcast depends on it."""

from __future__ import annotations

from collections.abc import Mapping

from fedlpp_ray.federation.wire import Wire
from fedlpp_ray.messages import quantized
from fedlpp_ray.quantization import QuantizedTensor

_START, _END = "sent-", ".safetensors"


class LastSent:
    """The last message of each edition, for a guard that remembers; without one, nothing.

    A broadcast is made while the round before it may still be recorded, and made again after an
    interruption. So it counts as sent once its own round is closed: what is made again is made from
    the same past.

    Args:
        wire: The messages.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._sent: dict[int, bytes] = {}
        self._made: dict[int, bytes] = {}

    def before(self, edition: int) -> Mapping[str, QuantizedTensor] | None:
        """Codes and scales by tensor of the last message of an edition; None: there was none."""
        payload = self._sent.get(edition)
        if payload is None:
            return None
        return quantized(
            payload, self._wire.broadcast(self._wire.rank(edition)), self._wire.downlink
        )

    def add(self, edition: int, payload: bytes) -> None:
        """Note a message of the broadcast that is being made."""
        if self._wire.downlink.guard.remembers:
            self._made[edition] = payload

    def close(self) -> None:
        """The round is closed: what was made for it was sent."""
        self._sent |= self._made
        self._made = {}

    def files(self) -> dict[str, bytes]:
        """What was sent last, as files by name."""
        return {f"{_START}{edition}{_END}": payload for edition, payload in self._sent.items()}

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Take back `files`, from among others."""
        self._made = {}
        self._sent = {
            int(name.removeprefix(_START).removesuffix(_END)): payload
            for name, payload in files.items()
            if name.startswith(_START)
        }
