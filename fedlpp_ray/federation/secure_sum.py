"""The server's side of secure aggregation in a round: masked updates in, their mean out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedlpp_ray.aggregation import ServerOptimizer
from fedlpp_ray.aggregation.rules import next_state
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.opening import Decoded, Opening
from fedlpp_ray.federation.private import private
from fedlpp_ray.federation.wire import Wire, edition
from fedlpp_ray.messages import MessageError
from fedlpp_ray.messages.checks import brief, check_norm
from fedlpp_ray.privacy.secure import Grid, SecureServer, Session
from fedlpp_ray.state import State


@dataclass(frozen=True)
class SecureTotal:
    """What the updates of a round come to; the counterpart of a `RoundSum`.

    Attributes:
        rule: The server's.
        clients: Whose updates are in the mean; none before it was unmasked.
        mean: K - D, float64.
    """

    rule: str
    clients: frozenset[int] = frozenset()
    mean: State = field(default_factory=dict)

    def direction(self) -> State:
        """K - D, float64."""
        return self.mean

    def next_state(
        self, state: State, broadcast: State, optimizer: ServerOptimizer, _random: torch.Generator
    ) -> State:
        """As of a `RoundSum` that averages updates."""
        return next_state(self.rule, state, broadcast, self.mean, optimizer)


class SecureSum:
    """The server's half of one round, and what the masked updates come to.

    Open, it is in the place of an `Aggregator`. Of what that checks of an update it checks form,
    sender and round; values are hidden, and each client itself keeps its own within `secure.clip`.
    `server.max_update_norm` is a limit of the mean, without what clients' own noise adds to it.

    Args:
        experiment: What is run.
        session: What all agree on.
        grid: How values become integers.

    Attributes:
        round: Which.
        session: The session.
        own: D at the server's own rank; empty where each client has an edition of its own.
        total: What the updates come to, once they are unmasked.

    Raises:
        UserError: the library is missing.
    """

    def __init__(self, experiment: Experiment, session: Session, grid: Grid) -> None:
        self.round, self.session = session.round, session
        self._experiment, self._grid = experiment, grid
        self._server = SecureServer(session)
        self._returned: set[int] = set()
        self.own: State = {}
        self.total = SecureTotal(experiment.server.rule)

    def open(self, opening: Opening) -> None:
        """Begin to receive masked updates.

        Args:
            opening: The round; its cohort is of the session's clients.

        Raises:
            MessageError: a broadcast is not what the round made.
        """
        self._cohort = {each.client for each in opening.cohort}
        self._clip = opening.clip
        self._wire = Wire(self._experiment, opening.schema)
        self._decoded = Decoded(opening, self._wire)
        self.own = self._decoded.own(self.round)

    @property
    def clients(self) -> list[int]:
        """Whose masked updates it holds, sorted."""
        return sorted(self._returned)

    def exchange(self, sent: Mapping[int, bytes]) -> dict[int, bytes]:
        """Take what clients send in a step, and end it; of the last step, make the mean.

        Args:
            sent: By client. Masked updates have come one by one (`receive`).

        Returns:
            What is sent to each client that is left.

        Raises:
            MessageError: a message is not as expected, or what is unmasked is no sum of updates.
            TooFewClientsError: fewer clients than the threshold are left.
        """
        for client, message in sent.items():
            self._server.receive(client, message)
        if not self._server.survivors:
            return self._server.advance()
        survivors = frozenset(self._server.survivors)
        self.total = replace(self.total, mean=self._mean(survivors), clients=survivors)
        return {}

    def receive(self, client: int, payload: bytes) -> None:
        """Check and add a client's masked update.

        Raises:
            MessageError: the client is not in the cohort or has returned, or the message is not of
                this session and step. Nothing has changed.
        """
        if type(client) is not int or client not in self._cohort:
            raise MessageError(f"round {self.round}: {brief(client)} is no client of the cohort")
        try:
            self._server.receive(client, payload)
        except MessageError as error:
            raise MessageError(
                f"round {self.round}, masked update of client {client} refused: {error}"
            ) from None
        self._returned.add(client)

    def verdict(self, client: int, payload: bytes) -> str | None:
        """As `receive`; why the update is refused, or None."""
        try:
            self.receive(client, payload)
        except MessageError as error:
            return str(error)
        return None

    def merge(self, _partial: bytes) -> list[int]:
        """Refuse it: the server alone adds up masked updates.

        Raises:
            MessageError: always.
        """
        raise MessageError(f"round {self.round}: masked updates come one by one, not as sums")

    def _mean(self, survivors: Collection[int]) -> State:
        """K - D in the server's gauge and units, float64."""
        schema = self._wire.update(self.round, self._experiment.lora.rank)
        mean = self._grid.mean(self._server.total(), schema, len(survivors))
        limit = given = self._experiment.server.max_update_norm
        if rules := private(self._experiment):
            limit += rules.slack(schema, self._clip)
        try:
            check_norm(mean, limit)
        except MessageError as error:
            raise MessageError(f"{error} (server.max_update_norm = {given:g})") from None
        key = edition(self._experiment, min(survivors))  # they differ in nothing that counts here
        mean = self._wire.masks.settle(mean, self._decoded.of(self.round, key))
        mean = self._wire.rotate(self.round, key, mean, back=True)
        return {name: tensor.double() for name, tensor in mean.items()}
