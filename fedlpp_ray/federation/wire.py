"""What travels on both links of an experiment, and in which form: both parties agree on it here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Generator

from fedlpp_ray.aggregation import Method, find_method, robustly
from fedlpp_ray.aggregation.products import rotate
from fedlpp_ray.config import (
    FULL_PRECISION,
    DownlinkConfig,
    Experiment,
    ServerConfig,
    UplinkConfig,
)
from fedlpp_ray.federation.masks import Masks, fill
from fedlpp_ray.messages import Codec, Envelope, decode, dither
from fedlpp_ray.privacy.dp import BELOW, CLIP
from fedlpp_ray.quantization import Guard, Quantizer
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import FACTOR_AXIS, VARIATE, Part, Schema, State, part

BF16 = 16
"""The value of `uplink.bits` that means bf16."""

Broadcast = Mapping[int, bytes]
"""The messages of one broadcast by edition: one for each rank that a client has, or, where each has
a message of its own (`DownlinkConfig.individual`), one for each client that reads it."""


def edition(experiment: Experiment, client: int) -> int:
    """The key of the message that a client reads."""
    return client if experiment.downlink.individual else experiment.lora.rank_of(client)


def downlink_codec(config: DownlinkConfig, schema: Schema) -> Codec:
    """The broadcast's codec: one quantizer for adapters, head and residuals alike.

    Only `full_precision_head` exempts the head, and `factors` one of the factors.
    """
    flags = frozenset(name for name in schema if part(name) == "columns")
    if config.bits == FULL_PRECISION:
        return Codec(None, flags=flags)
    quantizer = Quantizer(config.bits, config.kind, config.block, config.scale, config.rounding)
    whole: set[Part] = {"head"} if config.full_precision_head else set()
    if config.factors != "both":
        whole.add("B" if config.factors == "A" else "A")
    full_precision = frozenset(name for name in schema if part(name) in whole or name == CLIP)
    guard = Guard(
        config.hysteresis,
        config.hold_scales,
        dithered=config.dither != "none",
        magnitude=config.magnitude,
        subtracted=config.subtracts,
    )
    return Codec(quantizer, full_precision, flags=flags, guard=guard)


def uplink_codec(config: UplinkConfig) -> Codec:
    """The updates' codec, for all that travels."""
    if config.bits == FULL_PRECISION:
        return Codec(None)
    if config.bits == BF16:
        return Codec(None, dtype=torch.bfloat16)
    return Codec(Quantizer(config.bits, config.kind, config.block, config.scale, config.rounding))


def aggregation(config: ServerConfig) -> Method:
    """The aggregation method, robust where it is to be."""
    method = find_method(config.aggregation)
    if config.robust == "none":
        return method
    return robustly(method, config.robust, config.byzantine)


class Wire:
    """The messages of an experiment.

    Args:
        experiment: What is run.
        schema: Of the model's whole state, at the server's rank.

    Attributes:
        method: The aggregation method, which says what travels and how updates become one.
        masks: Which columns travel.
        kept: Names of the server's state.
        variates: Names and shapes of what has a control variate.
        counted: Name and shape of what an update says beside itself, where the clip adapts.
        downlink, uplink: The codecs.
    """

    def __init__(self, experiment: Experiment, schema: Schema) -> None:
        self.method = aggregation(experiment.server)
        self._experiment, self._schema = experiment, schema
        self._sent: frozenset[Part] = self.method.travels
        if experiment.server.send_residual:
            self._sent |= {"residual"}
        self.variates: Schema = {}
        if experiment.client.scaffold:
            self.variates = self._select(self.method.travels, experiment.lora.rank)
        self.kept = frozenset(n for n in schema if part(n) in self.method.travels | {"residual"})
        self.masks = Masks(experiment, self._select(self._sent, experiment.lora.rank))
        self.counted: Schema = {BELOW: (1,)} if experiment.dp.adaptive else {}
        self.uplink = replace(
            uplink_codec(experiment.uplink), full_precision=frozenset(self.counted)
        )
        self.downlink = downlink_codec(experiment.downlink, self.broadcast(experiment.lora.rank))

    def editions(self, clients: Collection[int]) -> Collection[int]:
        """The messages that a broadcast needs: of every rank, the server's too, or of `clients`."""
        if self._experiment.downlink.individual:
            return clients
        return sorted({self._experiment.lora.rank, *(self._experiment.lora.client_ranks or ())})

    def rank(self, edition: int) -> int:
        """The rank of those who read an edition."""
        lora = self._experiment.lora
        return lora.rank_of(edition) if self._experiment.downlink.individual else edition

    def envelope(self, round: int, edition: int) -> Envelope:
        """Of the broadcast in force in a round: when it was made, and for whom if for one alone."""
        down = self._experiment.downlink
        made = Envelope("broadcast", down.made_in(round))
        return replace(made, client=edition) if down.individual else made

    def broadcast(self, rank: int) -> Schema:
        """Names and shapes of the broadcast for clients of a rank."""
        variates = {f"{VARIATE}{name}": shape for name, shape in self.variates.items()}
        sent = {**self.masks.schema(self._select(self._sent, rank)), **self.masks.flags}
        if self._experiment.dp.adaptive:
            sent[CLIP] = (1,)
        return dict(sorted((sent | variates).items()))

    def read(
        self, round: int, edition: int, payload: bytes, max_norm: float = float("inf")
    ) -> State:
        """The broadcast in force in a round as its reader has it, in the broadcast's gauge.

        Whole, with zeros in the columns that did not travel, whose flags are beside it.

        Raises:
            MessageError: as `decode`.
        """
        schema, expected = self.broadcast(self.rank(edition)), self.envelope(round, edition)
        draws = self.dither(round, edition)
        state = decode(payload, expected, schema, self.downlink, max_norm=max_norm, draws=draws)
        return fill(state, state)

    def draws(self, round: int, edition: int) -> Generator:
        """What rounding draws from in the broadcast in force in a round.

        Where readers subtract the dither it stands for the key that they share with the server.
        """
        down, own = self._experiment.downlink, edition == self._experiment.lora.rank
        purpose = ("dither",) if down.lasting_dither else ("broadcast", down.made_in(round))
        return generator(self._experiment.seed, *purpose, *(() if own else (edition,)))

    def dither(self, round: int, edition: int) -> State | None:
        """Of the broadcast in force in a round what its readers subtract, by tensor, (n,)."""
        if not self.downlink.guard.subtracted:
            return None
        return dither(self.broadcast(self.rank(edition)), self.downlink, self.draws(round, edition))

    def update(self, round: int, rank: int) -> Schema:
        """Names and shapes of what a client of a rank returns in a round."""
        trained = self._select(self.method.trained(round) & self.method.travels, rank)
        return {**self.masks.schema(trained), **self.counted}

    def trained(self, round: int) -> Schema:
        """Names and shapes of all that an update of a round can change, at the server's rank."""
        parts = self.method.trained(round) & self.method.travels
        return {**self._select(parts, self._experiment.lora.rank), **self.counted}

    def rotate(self, round: int, edition: int, state: State, *, back: bool = False) -> State:
        """A state in the gauge of an edition in force, or an update back in the server's."""
        down = self._experiment.downlink
        if down.rotate == "none":
            return state
        own = (edition,) if down.rotate == "client" else ()
        random = generator(self._experiment.seed, "rotation", down.made_in(round), *own)
        return rotate(state, random, back=back)

    def _select(self, parts: frozenset[Part], rank: int) -> dict[str, tuple[int, ...]]:
        return {
            name: _shape_at_rank(name, shape, rank)
            for name, shape in self._schema.items()
            if part(name) in parts
        }


def _shape_at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    axis = FACTOR_AXIS.get(part(name))
    return shape if axis is None else (*shape[:axis], rank, *shape[axis + 1 :])
