"""The federation: rounds of FedLPP (Zhu et al., 2024), each in five steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.backend import Backend
from fedlpp_ray.federation.clock import Clock
from fedlpp_ray.federation.private import spent
from fedlpp_ray.federation.records import (
    Assignment,
    ClientRecord,
    ClientReport,
    Fault,
    Final,
    Measured,
    Memory,
    Pending,
    RoundRecord,
)
from fedlpp_ray.federation.sampling import strongest_client
from fedlpp_ray.federation.schedule import RoundPlan, Schedule, abandoned
from fedlpp_ray.federation.secure import Halves
from fedlpp_ray.federation.snapshot import Snapshot
from fedlpp_ray.federation.watch import Watch
from fedlpp_ray.federation.wire import Broadcast, edition
from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import TooFewClientsError
from fedlpp_ray.storage import StoredBytes

if TYPE_CHECKING:
    from fedlpp_ray.federation.attacked import Attacked

logger = logging.getLogger(__name__)

FRUITLESS = 2
"""After so many rounds in a row of which nothing was folded, one refused client, or a sum that is
not unmasked, ends the run."""


class Federation:
    """One federated run.

    Args:
        experiment: What to run.
        backend: The parties.
        keep: Is given each broadcast with the round in which it was made; after a resume perhaps
            again. None: where the run is attacked at its end, it keeps what that takes itself.

    Attributes:
        history: The finished rounds. A run that starts with a history continues after it.
        final: The server's final model, once the last round is finished, if there is to be one.
    """

    def __init__(
        self,
        experiment: Experiment,
        backend: Backend,
        keep: Callable[[int, Broadcast], None] | None = None,
    ) -> None:
        self.experiment = experiment
        self.backend = backend
        self._keep = keep
        self.history: list[RoundRecord] = []
        self.final: Final | None = None
        self._memories: dict[int, StoredBytes] = {}  # what clients keep
        self._broadcasts: dict[int, Broadcast] = {}  # by the round in which they were made
        self._taken: Snapshot | None = None
        examples = backend.examples()
        self._download = backend.download()
        self._schedule = Schedule(experiment, examples)
        self._strongest = strongest_client(experiment.lora, examples)
        self._watch = Watch(experiment, examples)

    def run(self) -> Iterator[RoundRecord]:
        """The rounds that remain, each yielded when it is measured: while the next one trains."""
        done, last = len(self.history), self.experiment.federation.rounds
        clock = Clock()
        for plan in self._schedule.plans(after=done):  # 1. Sample the cohort.
            # 2. The server encodes the broadcast once, or leaves the last one in force.
            self._put_in_force(plan.round, plan.sampled, clock)
            evaluation = self._evaluate(plan.round, clock) if plan.round > done + 1 else None
            # 3. Each client trains from it; the server folds each update as it comes, in any order.
            with clock("train"):
                halves = self._halves(plan)  # that mask the updates, if they are to be
            kept = {each: self._memory(each.client) for each in plan.cohort}
            broadcasts = self._trained_from(plan)
            training = self.backend.train(plan.round, kept, broadcasts, halves.maskings)
            if evaluation:
                yield self._measured(evaluation, clock)
            with clock("train"):
                reports = sorted(training, key=lambda report: report.client)
            # 4. What was folded becomes the server's next state.
            with clock("aggregate"):
                digest, reports = self._close(plan, reports, halves)
            # 5. Record it, and measure it while the next round trains.
            self._record(plan, reports, digest, halves)
        if len(self.history) > done:
            with clock("aggregate"):
                self.final = self.backend.finish()
            self._put_in_force(last + 1, [], clock)
            yield self._measured(self._evaluate(last + 1, clock), clock)

    def snapshot(self) -> Snapshot:
        """The run after its last finished round: to be taken when that has been yielded."""
        following = len(self.history) + 1
        if self._taken is None or len(self._taken.history) + 1 != following:
            kept = {made: b for made, b in self._broadcasts.items() if made < following}
            adapter = self.backend.adapter() if self.history else None
            memories = dict(self._memories)
            self._taken = Snapshot(tuple(self.history), memories, kept, adapter, self.final)
        return self._taken

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same experiment, with the same bits.

        Raises:
            ValueError: the state that comes of it is not the recorded one.
        """
        if snapshot.adapter is not None:
            last, digest = snapshot.history[-1], self.backend.restore(dict(snapshot.adapter))
            if digest != last.digest:
                raise ValueError(
                    f"the state restored is not that after round {last.round}: its digest is "
                    f"{digest}, recorded is {last.digest}"
                )
        self.history = list(snapshot.history)
        self._memories = dict(snapshot.memories)
        self._broadcasts = dict(snapshot.broadcasts)
        self.final = snapshot.final
        self._taken = snapshot

    def attack(self, sent: Callable[[], Mapping[int, Broadcast]] | None = None) -> Attacked | None:
        """Attack the finished run by the ladder; None where `adversary.at_end` asks for nothing.

        Args:
            sent: Reads all that `keep` was given.
        """
        if not self._watch.at_end:
            return None
        broadcasts = self._watch.read(sent() if sent else self._broadcasts)
        return self.backend.attack(broadcasts, self.history)

    def _put_in_force(self, round: int, clients: Sequence[int], clock: Clock) -> None:
        """Have the broadcast made from which clients that start in a round train, if one is due."""
        made = self.experiment.downlink.made_in(round)
        if made not in self._broadcasts:
            measured = {self._strongest} if self._is_evaluated(round - 1) else set()
            beside = sorted(measured - set(clients))
            with clock("broadcast"):
                self._broadcasts[made] = self.backend.encode_broadcast(made, clients, beside)
            if self._keep:
                self._keep(made, self._broadcasts[made])

    def _trained_from(self, plan: RoundPlan) -> dict[int, Broadcast]:
        """The broadcasts from the first on that someone in the round trains from."""
        parts = (*plan.cohort, *(each for each, _ in plan.absent))
        first = min((each.started for each in parts), default=plan.round)
        since = self.experiment.downlink.made_in(first)
        return {made: b for made, b in self._broadcasts.items() if made >= since}

    def _broadcast(self, started: int) -> Broadcast:
        return self._broadcasts[self.experiment.downlink.made_in(started)]

    def _memory(self, client: int) -> Memory:
        found = self._memories.get(client)
        return None if found is None else found.read()

    def _is_evaluated(self, round: int) -> bool:
        every, last = self.experiment.evaluation.every, self.experiment.federation.rounds
        return round > 0 and (round % every == 0 or round == last)

    def _evaluate(self, following: int, clock: Clock) -> Pending:
        """Begin to measure the state through what clients that start in the next round read."""
        if not self._is_evaluated(following - 1):
            return lambda: Measured(None)
        memory = self._memory(self._strongest)
        newest = self._watch.newest(self._broadcasts) if self._watch.due(following - 1) else {}
        with clock("evaluate"):
            return self.backend.evaluate(following, self._broadcast(following), memory, newest)

    def _measured(self, evaluation: Pending, clock: Clock) -> RoundRecord:
        """The last round with its evaluation, for which this waits, and its times."""
        with clock("evaluate"):
            found = evaluation()
        record = self.history[-1]
        busy = record.seconds["client_compute"] + found.seconds
        seconds = record.seconds | clock.seconds(busy) | {"leak": found.leak}
        self.history[-1] = replace(record, evaluation=found.evaluation, seconds=seconds)
        return self.history[-1]

    def _halves(self, plan: RoundPlan) -> Halves:
        """Those of all who are sampled; none without secure aggregation."""
        session = None
        if self.experiment.secure.threshold is not None:
            session = self.backend.open_session(plan.round, plan.sampled)
        return Halves(session, partial(self.backend.exchange, plan.round))

    def _close(
        self, plan: RoundPlan, reports: list[ClientReport], halves: Halves
    ) -> tuple[str, list[ClientReport]]:
        """Fold what has come, or, where that is too little, nothing."""
        needed = self.experiment.federation.min_updates
        came = sum(report.fault is None for report in reports)
        for report in reports:
            if report.fault:
                kind, reason = report.fault.kind, report.fault.reason
                logger.warning(
                    "round %d: client %d %s: %s", plan.round, report.client, kind, reason
                )
        broken = [r.fault for r in reports if r.fault and r.fault.kind in ("refused", "failed")]
        before = self.history[-FRUITLESS:]
        fruitless = len(before) == FRUITLESS and not any(record.folded for record in before)
        if broken and not came and (fruitless or len(broken) > 1):
            raise MessageError(f"round {plan.round}: no update could be used: {broken[0].reason}")
        fault: Fault | None = abandoned(came, needed)
        if plan.cohort and came >= needed:
            fault = self._unmask(reports, halves)
            if fault:
                logger.warning("round %d: %s", plan.round, fault.reason)
            if fault and fruitless:
                raise MessageError(f"round {plan.round}: {fault.reason}")
        if fault is None:
            self._memories |= {
                r.client: StoredBytes(r.memory)
                for r in reports
                if r.memory is not None and r.fault is None
            }
            return self.backend.aggregate(plan.round), reports
        reports = [r if r.fault else replace(r, fault=fault) for r in reports]
        return self.backend.discard(plan.round), reports

    def _unmask(self, reports: Sequence[ClientReport], halves: Halves) -> Fault | None:
        """Have those that came unmask their sum, if it is masked; why there is none, or None."""
        try:
            halves.unmask(reports)
        except (MessageError, TooFewClientsError) as error:
            cause = getattr(error, "cause", error)  # from an actor, Ray adds the traceback there
            return Fault("abandoned", f"no sum was unmasked: {cause}")
        return None

    def _record(
        self, plan: RoundPlan, reports: Sequence[ClientReport], digest: str, halves: Halves
    ) -> None:
        busy: dict[int, float] = {}
        for report in reports:
            busy[report.host] = busy.get(report.host, 0.0) + report.seconds
        seconds = {
            "client_compute": max(busy.values(), default=0.0),
            "simulated": plan.seconds,
        }
        clients = self._clients(plan, reports, halves)
        privacy = spent(self.experiment, plan.round, self.backend.clipping)
        self.history.append(RoundRecord(plan.round, None, clients, seconds, digest, privacy))
        needed = self.experiment.downlink.made_in(plan.oldest)
        used = {made: b for made, b in self._broadcasts.items() if made >= needed}
        attacked_at_end = self._watch.at_end and self._keep is None
        attacked = self._watch.read if attacked_at_end else self._watch.newest
        self._broadcasts = attacked(self._broadcasts) | used

    def _clients(
        self, plan: RoundPlan, reports: Sequence[ClientReport], halves: Halves
    ) -> tuple[ClientRecord, ...]:
        """Who was sampled, with the bytes of each: what it holds it does not download again."""
        holders = self._holders(plan.round)
        parts = {each.client: each for each in plan.cohort}
        rows = [(parts.get(r.client, Assignment(r.client, plan.round)), r) for r in reports]
        rows += [(each, ClientReport(each.client, fault=fault)) for each, fault in plan.absent]
        rows.sort(key=lambda row: (row[0].client, row[0].started))
        known: set[int] = set()
        if self._download:
            known = {client.client for record in self.history for client in record.clients}
        found = []
        for each, report in rows:  # a client that drops out of fedbuff may be there twice
            down = 0 if each.client in known else self._download
            known.add(each.client)
            if each.client not in holders:
                down += len(self._broadcast(each.started)[edition(self.experiment, each.client)])
            down, up = down + halves.down[each.client], report.up + halves.up[each.client]
            late = plan.round - each.started
            found.append(ClientRecord(each.client, down, up, report.loss, late, report.fault))
        return tuple(found)

    def _holders(self, round: int) -> set[int]:
        """Clients that hold the broadcast in force from an earlier round."""
        if self.experiment.federation.mode == "fedbuff":
            return set()  # each starts from another one
        since = self.experiment.downlink.made_in(round) - 1
        return {client.client for record in self.history[since:] for client in record.clients}
