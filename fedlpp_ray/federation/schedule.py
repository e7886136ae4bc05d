"""Who takes part in which round, and who is in time: known before anyone trains.

Speeds and dropouts are simulated (`simulation`): they follow from the seed, and so does the order
in which clients finish. So a run with stragglers, also an asynchronous one, gives the same bits on
any machine, and late clients need not be trained at all.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import SMALLEST_DISCOUNT, Assignment, Fault
from fedlpp_ray.federation.sampling import Cohorts
from fedlpp_ray.seeds import derive

Absence = tuple[Assignment, Fault]


@dataclass(frozen=True)
class RoundPlan:
    """One round, before it is run.

    Attributes:
        round: From 1.
        cohort: Whose updates are folded, by client.
        absent: Who was sampled, too, and has no part in it.
        seconds: How long it takes on the simulated clock.
        oldest: The earliest round whose broadcast someone still trains from afterwards.
    """

    round: int
    cohort: tuple[Assignment, ...]
    absent: tuple[Absence, ...]
    seconds: float
    oldest: int

    @property
    def sampled(self) -> list[int]:
        """Every client that has received a broadcast for this round."""
        return sorted({each.client for each in (*self.cohort, *(a for a, _ in self.absent))})


class Schedule:
    """The rounds of an experiment, in order.

    Args:
        experiment: What is run.
        examples: (clients,) number of examples of each.
    """

    def __init__(self, experiment: Experiment, examples: Sequence[int]) -> None:
        self._experiment, self._examples = experiment, examples
        federation, plain = experiment.federation, experiment.method != "federated"
        count = federation.cohort_size if plain else federation.sample_size
        self._cohorts = Cohorts(federation, experiment.seed, examples, count)

    def plans(self, after: int = 0) -> Iterator[RoundPlan]:
        """The rounds that follow round `after`."""
        rounds = self._experiment.federation.rounds
        if self._experiment.method != "federated":
            yield from map(self._plain, range(after + 1, rounds + 1))
        elif self._experiment.federation.mode == "fedbuff":
            # A buffered round follows from all before it.
            yield from islice(self._buffered(), after, rounds)
        else:
            yield from map(self._synchronous, range(after + 1, rounds + 1))

    def duration(self, client: int) -> float:
        """Simulated seconds of one client's training."""
        config, federation = self._experiment.simulation, self._experiment.federation
        steps = federation.steps(self._examples[client], self._experiment.client.batch_size)
        draw = random.Random(derive(self._experiment.seed, "speed", client)).gauss(0, 1)
        return steps * config.step_seconds * math.exp(config.speed_spread * draw)

    def _plain(self, round: int) -> RoundPlan:
        """The cohort is who is sampled."""
        cohort = tuple(Assignment(client, round) for client in self._cohorts.of(round))
        return RoundPlan(round, cohort, (), 0.0, round + 1)

    def _synchronous(self, round: int) -> RoundPlan:
        """The cohort is who of the sampled clients is done first, and before the deadline."""
        config, sampled = self._experiment.federation, self._cohorts.of(round)
        faults = {c: DROPPED for c in sampled if self._drops(round, c)}
        alive = sorted((self.duration(c), c) for c in sampled if c not in faults)
        deadline = math.inf if config.deadline is None else config.deadline
        done = [(t, c) for t, c in alive if t <= deadline][: config.cohort_size]
        full = len(done) == config.cohort_size
        seconds = done[-1][0] if full else min(deadline, max((t for t, _ in alive), default=0.0))
        in_time = [c for _, c in done]
        faults |= {c: _late(t, seconds) for t, c in alive if c not in in_time}
        if len(in_time) < config.min_updates:
            faults |= dict.fromkeys(in_time, abandoned(len(in_time), config.min_updates))
        cohort = tuple(Assignment(c, round) for c in sampled if c not in faults)
        absent = tuple((Assignment(c, round), faults[c]) for c in sampled if c in faults)
        return RoundPlan(round, cohort, absent, seconds, round + 1)

    def _drops(self, round: int, client: int) -> bool:
        draw = random.Random(derive(self._experiment.seed, "dropout", round, client)).random()
        return draw < self._experiment.simulation.dropout

    def _buffered(self) -> Iterator[RoundPlan]:
        """FedBuff (Nguyen et al., arXiv 2106.06639): a round is the next `buffer` to finish.

        A client whose update waits in the buffer does not start again before the round closes.
        """
        config, dropout = self._experiment.federation, self._experiment.simulation.dropout
        draws = random.Random(derive(self._experiment.seed, "fedbuff"))
        training: list[tuple[float, int, int]] = []  # (finished at, client, started in round)
        clock = began = 0.0
        for round in count(1):
            buffer: dict[int, int] = {}
            absent: list[Absence] = []
            while len(buffer) < config.updates:
                while len(training) < config.cohort_size:
                    client = _draw(draws, config.clients, {*buffer, *(c for _, c, _ in training)})
                    if client is None:
                        break
                    heapq.heappush(training, (clock + self.duration(client), client, round))
                clock, client, started = heapq.heappop(training)
                if draws.random() < dropout:
                    absent.append((self._assign(round, client, started), DROPPED))
                else:
                    buffer[client] = started
            oldest = min((started for _, _, started in training), default=round + 1)
            cohort = tuple(self._assign(round, c, started) for c, started in sorted(buffer.items()))
            yield RoundPlan(round, cohort, tuple(absent), clock - began, oldest)
            began = clock

    def _assign(self, round: int, client: int, started: int) -> Assignment:
        power = self._experiment.federation.staleness_power
        discount = max(SMALLEST_DISCOUNT, (1 + round - started) ** -power)
        return Assignment(client, started, discount)


def _draw(draws: random.Random, clients: int, taken: set[int]) -> int | None:
    """A client that is not taken; None where all are."""
    if len(taken) == clients:
        return None
    while (client := draws.randrange(clients)) in taken:
        pass
    return client


DROPPED = Fault("dropped", "did not return")


def _late(seconds: float, closed: float) -> Fault:
    return Fault("late", f"needs {seconds:.4g} simulated seconds; the round closed at {closed:.4g}")


def abandoned(came: int, needed: int) -> Fault:
    """Of a round to which too few updates came."""
    return Fault("abandoned", f"{came} updates came; federation.min_updates = {needed}")
