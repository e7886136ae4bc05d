"""A client that is a black box: what is left to who does not know its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Never, TypeVar

from fedlpp_ray.privacy.view import Base, Received, Tools, ViewError
from fedlpp_ray.state import State

Value = TypeVar("Value")


class Sealed:
    """Tools with which tensors have numbers for names, and clients do what a client does.

    Args:
        tools: What does it; it knows the tensors by their names.
        names: Of all tensors.

    Attributes:
        clients: The colluders.
        bases: The client's alone: what is in W0 cannot be matched to it.
        means: Those of the tools, without the architecture.
    """

    def __init__(self, tools: Tools, names: Iterable[str]) -> None:
        self._tools = tools
        self._numbers = {name: f"tensor {i}" for i, name in enumerate(sorted(names))}
        self._names = {number: name for name, number in self._numbers.items()}
        self.clients = tools.clients
        self.bases: tuple[Base, ...] = ("client",)
        self.means = tools.means - {"architecture"}

    def seal(self, received: Received) -> Received:
        """A broadcast as tensors of which nothing is known but their shapes, values and cells."""
        return _read(received, self._numbers)

    def open(self, state: State) -> State:
        """What the client makes of such tensors."""
        return _renamed(state, self._names)

    def loss(self, state: State, base: Base) -> float:
        """Mean loss on their validation examples, nats: the client measures."""
        return self._tools.loss(self.open(state), base)

    def take_part(self, read: Received, client: int, base: Base) -> State:
        """What the client's own training of its round makes of a broadcast."""
        found = self._tools.take_part(_read(read, self._names), client, base)
        return _renamed(found, self._numbers)

    def tune(self, *_: object) -> Never:
        """Refused.

        Raises:
            ViewError: always, as `distil`.
        """
        raise ViewError("the adversary cannot train but as a client does in a round")

    distil = tune


def _read(received: Received, names: Mapping[str, str]) -> Received:
    """A broadcast under other names of its tensors."""
    return replace(
        received,
        state=_renamed(received.state, names),
        cells=_renamed(received.cells, names),
        masked=received.masked and _renamed(received.masked, names),
        columns=_renamed(received.columns, names),
    )


def _renamed(values: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    return {names[name]: value for name, value in values.items()}
