"""The mean of the server's last states."""

from __future__ import annotations

import safetensors.torch

from fedlpp_ray.state import State


class Average:
    """(1/n) sum_t S_t over the last n rounds: iterate averaging, as SWA (arXiv 1803.05407).

    The rounds are known beforehand and close one after the other, so a running sum in float64 is
    enough, and exact in its order; none of the n states is kept.

    Args:
        count: n; below 2 there is no mean.
        last: The last round.
    """

    def __init__(self, count: int, last: int) -> None:
        self._count = count if count > 1 else 0
        self._rounds = range(last + 1 - self._count, last + 1)
        self._sum: State = {}

    def add(self, round: int, state: State) -> None:
        """Count the state after a round; the rounds come in their order, each once."""
        if round in self._rounds:
            self._sum = {
                name: self._sum[name] + tensor.double() if self._sum else tensor.double()
                for name, tensor in state.items()
            }

    def mean(self) -> State | None:
        """The mean in fp32, once the last round was added; None where there is to be none."""
        if not self._count:
            return None
        return {name: (tensor / self._count).float() for name, tensor in self._sum.items()}

    def save(self) -> bytes | None:
        """The sum so far, float64, as safetensors; None where there is none yet."""
        return safetensors.torch.save(self._sum) if self._sum else None

    def load(self, saved: bytes | None) -> None:
        """Go on from what `save` returned."""
        self._sum = {} if saved is None else safetensors.torch.load(saved)
