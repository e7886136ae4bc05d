"""Receives the updates of a round: decodes, checks and adds each as it arrives.

The server has one. A node of a cluster may have another for the clients on it, and sends what they
come to as one message; where and in which order updates were added changes no bit of the result.
"""

from __future__ import annotations

import hashlib
import json

import safetensors.torch

from fedlpp_ray.aggregation import Plan, Return, RoundSum
from fedlpp_ray.aggregation.products import pad
from fedlpp_ray.config import FULL_PRECISION
from fedlpp_ray.federation.opening import Decoded, Opening
from fedlpp_ray.federation.private import private
from fedlpp_ray.federation.records import SMALLEST_DISCOUNT, Assignment
from fedlpp_ray.federation.wire import Wire, edition
from fedlpp_ray.messages import Envelope, MessageError, decode
from fedlpp_ray.messages.checks import (
    brief,
    check_finite,
    check_header,
    check_listing,
    read_listing,
)
from fedlpp_ray.messages.codec import load
from fedlpp_ray.state import State, schema_digest

PARTIAL_VERSION = 1


class Aggregator:
    """The updates of one round so far.

    Args:
        opening: The round.

    Attributes:
        round: Which.
        total: What the updates come to.

    Raises:
        MessageError: a broadcast is not what its round made.
        ValueError: a client twice, a discount out of range, a broadcast that is missing, or clients
            that train other parts than each other.
    """

    def __init__(self, opening: Opening) -> None:
        self.round = opening.round
        self._opening, self._experiment = opening, opening.experiment
        self._wire = Wire(opening.experiment, opening.schema)
        self._private = private(opening.experiment)
        self._cohort = {each.client: each for each in opening.cohort}
        self._check_opening()
        newest = max((each.started for each in opening.cohort), default=opening.round)
        self._decoded = Decoded(opening, self._wire)
        self.own = self._decoded.own(newest)
        """D at the server's own rank, in the newest round that a client started in; empty where
        each client has an edition of its own."""
        config = self._experiment.server
        schema, clients = self._wire.trained(newest), max(1, len(opening.cohort))
        plan = Plan(self._wire.method, schema, self.own, config.rule, config.lr, clients)
        self.total = RoundSum(plan)

    @property
    def clients(self) -> list[int]:
        """Whose updates it holds, sorted."""
        return sorted(self.total.clients)

    def receive(self, client: int, payload: bytes) -> None:
        """Check and add a client's update.

        Raises:
            MessageError: the client is not in the cohort or has returned, or the update is not what
                the client was to send. Nothing has changed.
        """
        if type(client) is not int or client not in self._cohort:
            raise MessageError(f"round {self.round}: {brief(client)} is no client of the cohort")
        if client in self.total.clients:
            raise MessageError(f"round {self.round}: client {client} has returned before")
        try:
            self.total.add(client, self._read(self._cohort[client], payload))
        except (MessageError, OverflowError) as error:
            limit = self._experiment.server.max_update_norm
            raise MessageError(
                f"round {self.round}, update of client {client} refused: {error} "
                f"(server.max_update_norm = {limit:g})"
            ) from None

    def verdict(self, client: int, payload: bytes) -> str | None:
        """As `receive`; why the update is refused, or None."""
        try:
            self.receive(client, payload)
        except MessageError as error:
            return str(error)
        return None

    def partial(self) -> bytes:
        """All that it has received, as safetensors: exact sums, and what a method must keep."""
        header = self._header() | {"kinds": self.total.kinds, "clients": self.clients}
        tensors = {name: t.contiguous() for name, t in self.total.tensors().items()}
        return safetensors.torch.save(tensors, {"fedlpp": json.dumps(header)})

    def merge(self, partial: bytes) -> list[int]:
        """Add what another aggregator of the same opening has received.

        The sender is a party of the server's own: that its sums are made of updates within
        `server.max_update_norm` is for it to say.

        Returns:
            Its clients, sorted.

        Raises:
            MessageError: it is of another round, or holds a client that is not in the cohort or has
                returned, or is no such message. Nothing has changed.
        """
        try:
            return self._merge(partial)
        except (MessageError, ValueError) as error:
            raise MessageError(f"round {self.round}, partial result refused: {error}") from None

    def _merge(self, partial: bytes) -> list[int]:
        kinds = ["idle", "mean"] if self._wire.method.direction is None else []
        kinds += ["products"] if self.total.plan.summed() else []
        listing, header = read_listing(partial, self.total.parts(kinds, self._cohort))
        if not isinstance(header, dict):
            raise MessageError("the header is no object")
        kinds, clients = _strings(header.pop("kinds", None)), header.pop("clients", None)
        check_header(header, self._header())
        known = isinstance(clients, list) and all(type(c) is int for c in clients)
        if not known or clients != sorted(set(clients) & self._cohort.keys()):
            raise MessageError("its clients are not of the cohort, each once and in order")
        parts = self.total.parts(kinds, clients)
        check_listing(listing, parts)
        tensors = load(partial, parts)
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        weights = {client: self._weight(self._cohort[client]) for client in clients}
        self.total.absorb(tensors, weights, lambda client: self._of(self._cohort[client]))
        return list(clients)

    def _header(self) -> dict[str, object]:
        """By which the messages of two openings differ."""
        cohort = [(a.client, a.started, a.discount) for a in self._opening.cohort]
        return {
            "format": PARTIAL_VERSION,
            "kind": "partial",
            "round": self.round,
            "cohort": hashlib.sha256(json.dumps(sorted(cohort)).encode()).hexdigest(),
            "schema": schema_digest(self._opening.schema),
        }

    def _check_opening(self) -> None:
        cohort, made_in = self._opening.cohort, self._experiment.downlink.made_in
        if len(self._cohort) != len(cohort):
            raise ValueError("the cohort has a client twice")
        low, high = SMALLEST_DISCOUNT, 1.0
        for each in cohort:
            if not low <= each.discount <= high:
                raise ValueError(
                    f"client {each.client}: discount {each.discount}; allowed: {low:g} to {high:g}"
                )
            if made_in(each.started) not in self._opening.broadcasts:
                raise ValueError(
                    f"client {each.client}: the broadcast of round {each.started} is missing"
                )
        if len({tuple(self._wire.trained(each.started).items()) for each in cohort}) > 1:
            name = self._experiment.server.aggregation
            raise ValueError(
                f"server.aggregation '{name}' trains other parts from round to round, and the "
                "cohort's clients started in different ones"
            )

    def _weight(self, assignment: Assignment) -> float:
        by_examples = self._experiment.server.weighting == "examples"
        return self._opening.examples[assignment.client] if by_examples else 1

    def _read(self, assignment: Assignment, payload: bytes) -> Return:
        client, started = assignment.client, assignment.started
        lora, limit = self._experiment.lora, self._experiment.server.max_update_norm
        expected = Envelope("update", started, client, self._opening.examples[client])
        schema = self._wire.update(started, lora.rank_of(client))
        if self._private:
            limit += self._private.slack(schema, self._opening.clip)
        state = decode(payload, expected, schema, self._wire.uplink, max_norm=limit)
        if self._private:
            exact = self._experiment.uplink.bits == FULL_PRECISION
            self._private.admit(state, self._opening.clip, exact=exact)
        received, key = self._of(assignment), edition(self._experiment, client)
        state = self._wire.masks.settle(state, received)
        state = self._wire.rotate(started, key, state, back=True)
        if assignment.discount != 1:  # FedBuff: a late update is a shorter step
            state = {name: assignment.discount * tensor for name, tensor in state.items()}
        if self._private:
            state = self._private.bounded(state, self._opening.clip)
        return Return(received, pad(state, lora.rank), self._weight(assignment))

    def _of(self, assignment: Assignment) -> State:
        """D_i."""
        return self._decoded.of(assignment.started, edition(self._experiment, assignment.client))


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise MessageError("the header's kinds are not a list of names")
    return value
