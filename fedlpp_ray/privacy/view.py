"""What an adversary has: all that an attack is given, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from fedlpp_ray.state import State

Base = Literal["client", "public", "corrected"]
"""The frozen model that a state is put into: a client's, W0 in full precision, or W0 with the
server's correction towards a client's (`server.base_correction`)."""


class ViewError(ValueError):
    """An attack was to be given what its adversary does not have."""


@dataclass(frozen=True)
class Received:
    """A broadcast as a client has read it.

    Attributes:
        made: The round in which the server made it, from 1.
        client: Who read it.
        state: D, at the server's rank: factors, head and what else is trained.
        cells: Of each tensor that was quantized, the lowest and highest value that the server's can
            have had, by one who knows its defences of the codes. Empty for what travels whole.
    """

    made: int
    client: int
    state: State
    cells: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Tools(Protocol):
    """What the colluders can compute with their own means: their bases and their own examples."""

    @property
    def clients(self) -> frozenset[int]:
        """The colluders."""

    @property
    def bases(self) -> tuple[Base, ...]:
        """The models that they have."""

    def loss(self, state: State, base: Base) -> float:
        """Mean loss on their validation examples, nats."""

    def take_part(self, state: State, client: int, round: int, base: Base) -> State:
        """What the local training of a round makes of a state, on one of their clients."""

    def tune(self, state: State, base: Base) -> State:
        """The state of the lowest validation loss while their other examples are trained on."""


@dataclass(frozen=True)
class View:
    """All that the colluders have when they attack.

    Attributes:
        received: The broadcasts that they read, in the order in which they were made. At least one.
        rank: Of the server's factors.
        tools: Theirs.
        base: The model that the attack's state is made for.
        readable: By client, the rounds whose broadcasts it could read.

    Raises:
        ViewError: there is a broadcast that none of them could read, or a base that they lack.
    """

    received: tuple[Received, ...]
    rank: int
    tools: Tools
    readable: Mapping[int, frozenset[int]]
    base: Base = "client"

    def __post_init__(self) -> None:
        if not self.received:
            raise ViewError("the adversary has received no broadcast")
        if strangers := sorted(self.readable.keys() - self.tools.clients):
            raise ViewError(f"client {strangers[0]} is none of the adversary's")
        for each in self.received:
            if each.made not in self.readable.get(each.client, ()):
                raise ViewError(
                    f"client {each.client} could not read the broadcast of round {each.made}"
                )
        if self.base not in self.tools.bases:
            raise ViewError(f"the adversary has no {self.base} base")
        made = [each.made for each in self.received]
        if made != sorted(made):
            raise ViewError("the broadcasts are not in the order in which they were made")

    @property
    def last(self) -> Received:
        """The newest broadcast."""
        return self.received[-1]

    def loss(self, state: State) -> float:
        """Of a state in this base, on the colluders' validation examples, nats."""
        return self.tools.loss(state, self.base)
