"""What the adversary's clients read of a run's broadcasts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlpp_ray.aggregation.products import pad
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.masks import all_columns, columns_of, cut
from fedlpp_ray.federation.wire import Broadcast, Wire, edition
from fedlpp_ray.messages import quantized
from fedlpp_ray.privacy.view import Received
from fedlpp_ray.state import FACTOR_AXIS, State, part


class Reader:
    """Reads broadcasts as clients do; what never travels is as the seed made it.

    The adversary knows the experiment, so that its cells are those of the defences of the codes;
    with `downlink.perturbation` they would bound S and its noise, so there are none. What a message
    lacks is filled in from the one before, but for a gauge that turns, where that is another's.
    What has never come is as the seed made it, and zero to who does not know the architecture.

    Args:
        experiment: What was run.
        wire: Its messages.
        initial: What every client has before the first broadcast.
    """

    def __init__(self, experiment: Experiment, wire: Wire, initial: State) -> None:
        self._experiment, self._wire, self._initial = experiment, wire, initial
        self._unseen = initial
        if experiment.adversary.architecture == "unknown":
            self._unseen = {name: torch.zeros_like(tensor) for name, tensor in initial.items()}

    def read(
        self, broadcasts: Mapping[int, Broadcast], readable: Mapping[int, frozenset[int]]
    ) -> Iterator[Received]:
        """Of each round the messages of all ranks of theirs, the highest last; or each one's own.

        A client has one of its own of the rounds in which it was sampled or measured: whom the
        server did not send one has none, also under `adversary.rounds: all`.

        Args:
            broadcasts: By the round in which they were made.
            readable: By client of the adversary, the rounds whose broadcasts it could read. Of
                several that have a message in common the first is its reader.

        Raises:
            MessageError: a message is not what its round made.
        """
        before: dict[int, bytes] = {}
        newest = self._unseen
        for made, broadcast in sorted(broadcasts.items()):
            keys = {
                edition(self._experiment, client): client
                for client in reversed(list(readable))
                if made in readable[client]
            }
            read = sorted(keys.keys() & broadcast.keys())
            for key in read:
                found = self._one(
                    Message(made, keys[key], key, broadcast[key]), before.get(key), newest
                )
                newest = found.state
                yield found
            before = {key: broadcast[key] for key in read}

    def _one(self, message: Message, before: bytes | None, newest: State) -> Received:
        """`before` is the message made before, if one of the colluders could read it."""
        made, key, payload = message.made, message.edition, message.payload
        rank, down = self._wire.rank(key), self._experiment.downlink
        schema, codec = self._wire.broadcast(rank), self._wire.downlink
        read = self._wire.read(made, key, payload)
        whole = pad(read, self._experiment.lora.rank)
        start = self._initial | {name: t for name, t in whole.items() if name in self._initial}
        places = {
            name: Place(name, tuple(tensor.shape), rank, columns_of(name, read))
            for name, tensor in start.items()
        }
        lacking = [name for name in whole.keys() & start.keys() if places[name].lacks]
        compact, known = cut(read, read), newest if down.rotate == "none" else start
        state = {name: places[name].put(compact[name], known[name]) for name in lacking}
        cells = {}
        if codec.quantizer and not down.perturbation:
            last = quantized(before, schema, codec) if before else {}
            draws = self._wire.dither(made, key) or {}
            for name, tensor in quantized(payload, schema, codec).items():
                if name in start:
                    low, high = codec.guard.cells(
                        tensor, last.get(name), first=made == 1, draws=draws.get(name)
                    )
                    place, ends = places[name], torch.full_like(start[name], math.inf)
                    cells[name] = place.put(low, -ends), place.put(high, ends)
        masked, columns = start if lacking else None, all_columns(read)
        return Received(made, message.client, start | state, cells, masked, columns)


@dataclass(frozen=True)
class Message:
    """A message of a broadcast.

    Attributes:
        made: The round in which the server made it.
        client: Who reads it.
        edition: Its key in the broadcast.
        payload: It.
    """

    made: int
    client: int
    edition: int
    payload: bytes


@dataclass(frozen=True)
class Place:
    """Where what a message has of a tensor belongs in the server's, and in which units.

    Attributes:
        name: Of the tensor.
        shape: The server's.
        rank: Of the message.
        columns: Those that it has, bool; None: all.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    columns: Tensor | None

    @property
    def lacks(self) -> bool:
        """Whether the message has less than the tensor."""
        return self.columns is not None or self._ranks > 1

    @property
    def _ranks(self) -> float:
        """The server's rank in that of the message."""
        axis = FACTOR_AXIS.get(part(self.name))
        return 1.0 if axis is None else self.shape[axis] / self.rank

    def put(self, values: Tensor, into: Tensor) -> Tensor:
        """Values of the message, in the server's units, in the place of others.

        Args:
            values: (rows, columns) that have come, or of the tensor's shape.
            into: Of the tensor's shape; it is not changed.
        """
        if not self.lacks:
            return values
        into, unit = into.clone(), math.sqrt(self._ranks)
        if self.columns is None:
            into[tuple(slice(size) for size in values.shape)] = values * unit
        else:
            share = float(self.columns.sum()) / len(self.columns)
            into[: values.shape[0], self.columns] = values * (unit * share)
        return into
