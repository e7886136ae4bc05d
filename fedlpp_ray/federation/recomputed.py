"""The updates of a finished run, made again from the broadcasts that it kept.

No update is kept. Each follows from its broadcast, its client, the round and the seed, bit for bit:
the training, the clip and a client's share of the noise (`dp`), the rounding of the uplink. What a
client kept from its rounds before (`Memory`) follows from these, which are then made again first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.records import ClientUpdate, Memory, RoundRecord
from fedlpp_ray.federation.wire import Broadcast

MOST = 8
"""Updates of a round that are chosen where no client is named."""


@dataclass(frozen=True)
class Sent:
    """An update that a run's server folded.

    Attributes:
        round: In which it was folded.
        started: In which its client began, from the broadcast then in force; of fedbuff perhaps an
            earlier one.
        client: Whose.
        loss: Mean training loss as the run recorded it, nats.
        up: Bytes of its message.
    """

    round: int
    started: int
    client: int
    loss: float | None
    up: int

    def is_that(self, update: ClientUpdate) -> bool:
        """Whether an update made again has the recorded loss, to the digit, and length."""
        return (update.loss, len(update.payload)) == (self.loss, self.up)


def all_sent(history: Iterable[RoundRecord]) -> list[Sent]:
    """Every folded update, by round and client."""
    return [
        Sent(record.round, record.round - each.staleness, each.client, each.loss, each.up)
        for record in history
        for each in record.folded
    ]


def choose(
    history: Sequence[RoundRecord], rounds: Sequence[int] | None, clients: Sequence[int] | None
) -> list[Sent]:
    """The updates to look at, by round and client.

    Args:
        history: The run's rounds.
        rounds: Which; None: the first, the middle and the last that folded an update, and of each
            client that is named its own.
        clients: Whose; None: all, but the first `MOST` of a round.

    Raises:
        UserError: a round, or a client in all of these rounds, has no update, and why.
    """
    for round in rounds or ():
        if not 1 <= round <= len(history):
            raise UserError(f"--rounds {round}: the run has rounds 1 to {len(history)}")
    sent = all_sent(history)
    groups = [[x for x in sent if x.client == c] for c in clients] if clients else [sent]
    found = {
        each
        for group in groups
        for each in group
        if each.round in (_spread(group) if rounds is None else rounds)
    }
    for client in clients or ():
        if not any(each.client == client for each in found):
            raise UserError(f"--clients {client}: {_why(history, rounds, client)}")
    by_round: dict[int, list[Sent]] = {round: [] for round in rounds or ()}
    for each in sorted(found, key=lambda x: (x.round, x.client)):
        by_round.setdefault(each.round, []).append(each)
    for round, there in by_round.items():
        if not there:
            whose = " of these clients" if clients else ""
            raise UserError(f"--rounds {round}: no update{whose} was folded in it")
    if not found:
        raise UserError("the run has folded no update")
    return [x for _, part in sorted(by_round.items()) for x in (part if clients else part[:MOST])]


def _spread(sent: Sequence[Sent]) -> set[int]:
    """The first, the middle and the last round of some updates."""
    there = sorted({each.round for each in sent})
    return {there[0], there[len(there) // 2], there[-1]} if there else set()


def check_recomputable(experiment: Experiment) -> None:
    """Refuse experiments whose updates one process cannot make again.

    Raises:
        UserError: naming the key.
    """
    client = experiment.client
    asked = {"client.num_workers": client.num_workers > 1, "client.zero.stage": client.zero.stage}
    if experiment.method != "federated":
        raise UserError(f"method '{experiment.method}' has no updates that a server sees")
    if (threshold := experiment.secure.threshold) is not None:
        raise UserError(
            f"secure.threshold = {threshold}: the server saw the sum of a round's updates alone"
        )
    for key, several in asked.items():
        if several:
            raise UserError(f"{key}: an update of several ranks is not made again by one process")


class Recomputed:
    """Makes updates again.

    Args:
        experiment: What was run.
        broadcasts: All that were sent, by the round in which they were made.
        history: The finished rounds.
        emulator: What clients had in the place of W0, if they did.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        broadcasts: Mapping[int, Broadcast],
        history: Iterable[RoundRecord],
        emulator: bytes | None,
    ) -> None:
        self._host = ClientHost(experiment, emulator=emulator)
        self._broadcasts, self._made_in = broadcasts, experiment.downlink.made_in
        self._sent = all_sent(history)
        self._keeps = (
            experiment.uplink.error_feedback
            or experiment.client.scaffold
            or bool(find_method(experiment.server.aggregation).personal)
        )
        self._after: dict[tuple[int, int], Memory] = {}  # by round and client

    def broadcast(self, sent: Sent) -> Broadcast:
        """What the client began from.

        Raises:
            UserError: it was not kept.
        """
        made = self._made_in(sent.started)
        if made not in self._broadcasts:
            raise UserError(f"the broadcast of round {made} was not kept")
        return self._broadcasts[made]

    def update(self, sent: Sent) -> ClientUpdate:
        """The update, with whatever its client has kept since its first round.

        Raises:
            MessageError: the broadcast is not what was to be sent, or the training diverged.
            UserError: a broadcast was not kept.
        """
        memory: Memory = None
        if self._keeps:
            mine = [x for x in self._sent if x.client == sent.client and x.round < sent.round]
            for before in mine:
                key = before.round, before.client
                if key not in self._after:
                    self._after[key] = self._train(before, memory).memory
                memory = self._after[key]
        return self._train(sent, memory)

    def _train(self, sent: Sent, memory: Memory) -> ClientUpdate:
        return self._host.train(sent.started, sent.client, self.broadcast(sent), memory)


def _why(history: Sequence[RoundRecord], rounds: Sequence[int] | None, client: int) -> str:
    """Why a client has no update in some rounds, or in any."""
    for record in history:
        for each in record.clients:
            asked = rounds is None or record.round in rounds
            if each.client == client and asked and each.fault:
                return f"no update in round {record.round}: {each.fault.kind}, {each.fault.reason}"
    own = [x.round for x in all_sent(history) if x.client == client]
    where = f"in rounds {', '.join(map(str, own))}" if own else "in none"
    return (
        f"not sampled in {', '.join(map(str, rounds or ())) or 'any round'}; it has updates {where}"
    )
