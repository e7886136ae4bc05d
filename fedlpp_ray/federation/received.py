"""What the adversary's clients read of a run's broadcasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedlpp_ray.aggregation.products import pad
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.wire import Broadcast, Wire, edition
from fedlpp_ray.messages import quantized
from fedlpp_ray.privacy.view import Received
from fedlpp_ray.state import State


class Reader:
    """Reads broadcasts as clients do; what never travels is as the seed made it.

    The adversary knows the experiment, so that its cells are those of the defences of the codes;
    with `downlink.perturbation` they would bound S and its noise, so there are none.

    Args:
        experiment: What was run.
        wire: Its messages.
        initial: What every client has before the first broadcast.
    """

    def __init__(self, experiment: Experiment, wire: Wire, initial: State) -> None:
        self._experiment, self._wire, self._initial = experiment, wire, initial

    def read(
        self, broadcasts: Mapping[int, Broadcast], readable: Mapping[int, frozenset[int]]
    ) -> Iterator[Received]:
        """Of each round the message of the highest rank; or each colluder's own, where it has one.

        A client has one of its own of the rounds in which it was sampled or measured: whom the
        server did not send one has none, also under `adversary.rounds: all`.

        Args:
            broadcasts: By the round in which they were made.
            readable: By client of the adversary, the rounds whose broadcasts it could read.

        Raises:
            MessageError: a message is not what its round made.
        """
        individual = self._experiment.downlink.individual
        before: dict[int, bytes] = {}
        for made, broadcast in sorted(broadcasts.items()):
            keys = {
                edition(self._experiment, client): client
                for client in sorted(readable, reverse=True)
                if made in readable[client]
            }
            read = sorted(keys.keys() & broadcast.keys())
            for key in read if individual else read[-1:]:
                yield self._one(made, keys[key], key, broadcast[key], before.get(key))
            before = {key: broadcast[key] for key in read}

    def _one(
        self, made: int, client: int, key: int, payload: bytes, before: bytes | None
    ) -> Received:
        """`before` is the message made before, if one of the colluders could read it."""
        rank, lora = self._wire.rank(key), self._experiment.lora
        noisy = self._experiment.downlink.perturbation > 0
        schema, codec = self._wire.broadcast(rank), self._wire.downlink
        state = pad(self._wire.read(made, key, payload), lora.rank)
        held = self._initial | {name: t for name, t in state.items() if name in self._initial}
        cells = {}
        if codec.quantizer and rank == lora.rank and not noisy:
            last = quantized(before, schema, codec) if before else {}
            draws = self._wire.dither(made, key) or {}
            cells = {
                name: codec.guard.cells(
                    tensor, last.get(name), first=made == 1, draws=draws.get(name)
                )
                for name, tensor in quantized(payload, schema, codec).items()
                if name in held and tensor.shape == tuple(held[name].shape)
            }
        return Received(made, client, held, cells)
