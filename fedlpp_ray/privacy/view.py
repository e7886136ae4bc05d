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


Means = Literal["architecture", "auxiliary", "masks", "average", "returns"]
"""What not every adversary has: to know what the tensors of a broadcast are (`Sealed` has those of
one who does not), text of its own, and what only some runs have: parts that not every message
brings, a final model that is a mean, returns that the server's next state follows from."""


class ViewError(ValueError):
    """An attack was to be given what its adversary does not have."""


@dataclass(frozen=True)
class Received:
    """A broadcast as a client has read it.

    Attributes:
        made: The round in which the server made it, from 1.
        client: Who read it.
        state: What D says of the server's state, at its rank: factors, head and what else is
            trained. Without the factor of a mask, and what the message lacks, masked columns or
            the rest of the rank, as the newest one before has it, or as the seed made it.
        cells: Of each tensor that was quantized, the lowest and highest value that the server's can
            have had, by one who knows its defences of the codes; of what the message lacks -inf and
            inf. Empty for what travels whole.
        masked: D as its reader trains from it, where that is not `state`.
        columns: Of each masked tensor the flags of the columns that have come, which are all that
            its reader trains.
    """

    made: int
    client: int
    state: State
    cells: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masked: State | None = None
    columns: State = field(default_factory=dict)

    @property
    def start(self) -> State:
        """D as its reader trains from it."""
        return self.state if self.masked is None else self.masked


@dataclass(frozen=True)
class Returns:
    """What colluders have returned to a server that adds the mean of a cohort's updates.

    Attributes:
        weights: By round and colluder that has returned an update, its weight in a mean.
        lr: What the server multiplies the mean by.
        initial: The state before the first round, which every client has from the seed.
    """

    weights: Mapping[int, Mapping[int, float]]
    lr: float
    initial: State


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

    def take_part(self, read: Received, client: int, base: Base) -> State:
        """What the local training of its round makes of a broadcast, on one of their clients."""

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
        averaged: The rounds that begin with the states of which the server's final model is the
            mean, the one that would begin now included; empty: it is none.
        returns: What they have returned, where the server's state follows from returns.

    Raises:
        ViewError: there is a broadcast or a return that is none of theirs, or a base that they
            lack.
    """

    received: tuple[Received, ...]
    rank: int
    tools: Tools
    readable: Mapping[int, frozenset[int]]
    base: Base = "client"
    averaged: Sequence[int] = ()
    returns: Returns | None = None

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
        returns = self.returns.weights.values() if self.returns else ()
        if strangers := sorted({each for who in returns for each in who} - self.tools.clients):
            raise ViewError(f"what client {strangers[0]} returned is none of the adversary's")
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
