"""What an adversary has: all that an attack is given, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from fedlpp_ray.state import State, layers_of

Base = Literal["client", "public", "corrected"]
"""The frozen model that a state is put into: a client's, W0 in full precision, or W0 with the
server's correction towards a client's (`server.base_correction`)."""


Means = Literal["architecture", "auxiliary"]
"""What not every adversary has: to know what the tensors of a broadcast are (`Sealed` has those of
one who does not), and text of its own."""


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

    @property
    def means(self) -> frozenset[Means]:
        """What else they have."""

    def loss(self, state: State, base: Base) -> float:
        """Mean loss on their validation examples, nats."""

    def take_part(self, state: State, client: int, round: int, base: Base) -> State:
        """What the local training of a round makes of a state, on one of their clients."""

    def tune(self, state: State, base: Base) -> State:
        """The state of the lowest validation loss while their other examples are trained on.

        Raises:
            ViewError: they do not know the architecture.
        """

    def distil(self, state: State, teachers: Sequence[tuple[float, State]], base: Base) -> State:
        """The state of the lowest validation loss while it learns what teachers say of their text.

        Args:
            state: To start from.
            teachers: Each with its weight in the mean of their probabilities; the newest is last.
            base: The model that all of them are put into.

        Raises:
            ViewError: they do not know the architecture, or have no auxiliary text.
        """


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

    def layers(self) -> list[str]:
        """The adapted layers, each of which is a product of factors.

        Raises:
            ViewError: the adversary does not know the architecture.
        """
        if "architecture" not in self.tools.means:
            raise ViewError("the adversary does not know which tensors are factors of what")
        return layers_of(sorted(self.last.state))

    def loss(self, state: State) -> float:
        """Of a state in this base, on the colluders' validation examples, nats."""
        return self.tools.loss(state, self.base)
