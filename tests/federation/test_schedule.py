"""Who takes part, and who is in time: deadlines, over-selection, dropouts, FedBuff."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import pairwise

import pytest

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation.sampling import Cohorts, sample_cohort
from fedlpp_ray.federation.schedule import RoundPlan, Schedule

CLIENTS = 40
FEDBUFF = {"federation.mode": "fedbuff", "simulation.speed_spread": 1.0}


def experiment(**values: object) -> Experiment:
    base = {"federation.clients": CLIENTS, "federation.cohort": 8, "federation.rounds": 30}
    return Experiment().with_values(base | {k.replace("__", "."): v for k, v in values.items()})


def plans(experiment: Experiment, after: int = 0) -> list[RoundPlan]:
    return list(Schedule(experiment, [16] * experiment.federation.clients).plans(after))


def duration(experiment: Experiment, client: int) -> float:
    return Schedule(experiment, [16] * CLIENTS).duration(client)


def test_without_stragglers_the_cohort_is_who_is_sampled() -> None:
    config = experiment()
    for plan in plans(config):
        cohort = sample_cohort(config.federation, config.seed, plan.round)
        assert tuple(each.client for each in plan.cohort) == cohort
        assert {(each.started, each.discount) for each in plan.cohort} == {(plan.round, 1.0)}
        assert (plan.absent, plan.seconds) == ((), 10.0)  # 10 steps of a second


def test_the_fastest_of_more_make_the_cohort() -> None:
    config = experiment(federation__over_selection=0.5, simulation__speed_spread=1.0)
    for plan in plans(config):
        assert len(plan.cohort) == 8
        assert len(plan.absent) == 4
        slowest = max(duration(config, each.client) for each in plan.cohort)
        assert plan.seconds == slowest
        assert all(duration(config, each.client) >= slowest for each, _ in plan.absent)
        assert {fault.kind for _, fault in plan.absent} == {"late"}


def test_a_deadline_closes_the_round_without_those_who_are_late() -> None:
    config = experiment(federation__deadline=10.0, simulation__speed_spread=1.0)
    found = plans(config)
    for plan in found:
        assert all(duration(config, each.client) <= 10 for each in plan.cohort)
        assert all(duration(config, each.client) > 10 for each, _ in plan.absent)
        assert plan.seconds == 10 if plan.absent else plan.seconds <= 10
    # Half of the clients are slower than the median, whose 10 steps take 10 seconds.
    assert 0.3 < statistics.mean(len(plan.cohort) / 8 for plan in found) < 0.7


def test_who_drops_out_is_drawn_anew_in_every_round() -> None:
    found = plans(experiment(simulation__dropout=0.25, federation__rounds=200))
    dropped = Counter(each.client for plan in found for each, _ in plan.absent)
    assert 0.2 < sum(dropped.values()) / (200 * 8) < 0.3
    assert len(dropped) == CLIENTS


def test_a_round_with_too_few_is_abandoned_and_says_so() -> None:
    config = experiment(simulation__dropout=0.5, federation__min_updates=5)
    found = plans(config)
    kinds = [{fault.kind for _, fault in plan.absent} for plan in found]
    assert any("abandoned" in each for each in kinds)
    for plan, each in zip(found, kinds, strict=True):
        assert (plan.cohort == ()) == ("abandoned" in each)
        assert plan.cohort == () or len(plan.cohort) >= 5
        assert len(plan.cohort) + len(plan.absent) == 8


@pytest.mark.parametrize("values", [{}, FEDBUFF | {"simulation.dropout": 0.2}])
def test_a_schedule_goes_on_where_it_was(values: dict[str, object]) -> None:
    config = experiment().with_values(values)
    assert plans(config, after=11) == plans(config)[11:]
    assert plans(config.with_values({"seed": 1})) != plans(config)


def test_equal_clients_make_fedbuff_two_turns_of_half_the_cohort() -> None:
    """8 train at a time and 4 make a round, so of the first 8 the second half is one round late.

    Of those that replace them, all at second 10, each starts from what is newest at its turn.
    """
    first, second, third, fourth = plans(experiment(federation__mode="fedbuff"))[:4]
    assert [each.started for each in first.cohort] == [1] * 4
    assert [each.started for each in second.cohort] == [1] * 4
    assert [each.discount for each in second.cohort] == [2**-0.5] * 4
    started = sorted(each.started for each in (*third.cohort, *fourth.cohort))
    assert started == [1, 1, 1, 2, 2, 2, 2, 3]
    assert (first.seconds, second.seconds, third.seconds) == (10.0, 0.0, 10.0)


def test_fedbuff_keeps_as_many_in_training_and_forgets_no_broadcast_in_use() -> None:
    config = experiment().with_values(FEDBUFF | {"federation.buffer": 3, "simulation.dropout": 0.1})
    found = plans(config)
    clock = 0.0
    for plan, following in pairwise(found):
        clients = [each.client for each in plan.cohort]
        assert len(set(clients)) == 3
        assert clients == sorted(clients)
        assert plan.seconds >= 0
        clock += plan.seconds
        for each in following.cohort:
            assert plan.oldest <= each.started <= following.round
            assert each.discount == (1 + following.round - each.started) ** -0.5
    assert max(p.round - each.started for p in found for each in p.cohort) > 2
    # 8 at once, each 10 s at the median: what the clock shows is their throughput.
    assert math.isclose(clock, 29 * 3 * 10 / 8, rel_tol=0.6)


def test_a_client_is_in_one_training_at_a_time() -> None:
    """Reconstructed from starts and durations, independently of the event queue."""
    config = experiment().with_values(FEDBUFF | {"federation.rounds": 60, "federation.clients": 12})
    ends = [0.0]
    for plan in plans(config):
        ends.append(ends[-1] + plan.seconds)
    finished: dict[int, list[tuple[int, float]]] = {}
    for plan in plans(config):
        for each in plan.cohort:
            finished.setdefault(each.client, []).append((each.started, ends[plan.round]))
    for client, rounds in finished.items():
        for started, end in rounds:
            # It began when its broadcast was there, and before the next one was.
            assert ends[started - 1] <= end - duration(config, client) + 1e-6 or started == 1
        for (_, end), (started, _) in pairwise(rounds):
            assert ends[started - 1] >= end - 1e-6


@pytest.mark.parametrize(
    ("cap", "values"),
    [
        (3, {}),  # 30 rounds of 8 of 90: in the last of them 10 to 13 are left
        (3, {"federation.over_selection": 0.5, "federation.cohort": 5}),
        (3, {"simulation.dropout": 0.3, "federation.min_updates": 6}),
        (3, {"federation.sampling": "examples", "server.weighting": "uniform"}),
        (1, {"federation.rounds": 11}),
    ],
    ids=str,
)
def test_who_was_sampled_so_often_is_not_sampled_again(cap: int, values: dict[str, object]) -> None:
    """Absent clients have received the broadcast too, so that they count."""
    open = experiment(federation__clients=90).with_values(values)
    capped = open.with_values({"federation.max_participations": cap})
    found, free = plans(capped), plans(open)
    size = capped.federation.sample_size
    often = Counter[int]()
    for plan, other in zip(found, free, strict=True):
        assert len(plan.sampled) == len(plan.cohort) + len(plan.absent) == size
        exhausted = {client for client, times in often.items() if times == cap}
        assert not exhausted & set(plan.sampled)
        if not exhausted:  # as long as nobody is left out, nothing changes
            assert plan == other
        often.update(plan.sampled)
    assert max(often.values()) == cap
    assert max(Counter(client for plan in free for client in plan.sampled).values()) > cap
    assert plans(capped, after=9) == found[9:]


def test_a_limit_that_never_binds_changes_nothing() -> None:
    everybody = experiment(federation__cohort=CLIENTS)
    assert plans(everybody.with_values({"federation.max_participations": 30})) == plans(everybody)


def test_among_those_left_the_draw_is_uniform() -> None:
    """Four clients, two a round, once each: the second pair is who is left, the first is any."""
    config = experiment(federation__clients=4, federation__cohort=2, federation__rounds=2)
    capped = config.with_values({"federation.max_participations": 1}).federation
    pairs = Counter(Cohorts(capped, seed, [16] * 4).of(2) for seed in range(3000))
    assert len(pairs) == 6
    assert all(abs(times - 500) < 4 * (3000 * 5 / 36) ** 0.5 for times in pairs.values())


def test_a_limit_is_refused_where_clients_may_run_out() -> None:
    """And the least that is allowed is, whoever is drawn first."""
    for clients, size, rounds in ((40, 8, 30), (7, 3, 5), (9, 8, 4), (5, 5, 3), (12, 1, 20)):
        base = {
            "federation.clients": clients,
            "federation.cohort": size,
            "federation.rounds": rounds,
        }
        with pytest.raises(ConfigError, match="max_participations") as refused:
            experiment().with_values(base | {"federation.max_participations": 1})
        words = str(refused.value)
        for part in (f"rounds = {rounds} of {size} sampled", f"federation.clients = {clients}"):
            assert part in words
        least = int(words.partition("allowed here: ")[2].partition(" ")[0])
        with pytest.raises(ConfigError, match=f"allowed here: {least} and more"):
            experiment().with_values(base | {"federation.max_participations": least - 1})
        capped = experiment().with_values(base | {"federation.max_participations": least})
        for seed in range(20):
            assert len(plans(capped.with_values({"seed": seed}))) == rounds


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"federation.mode": "fedbuff", "federation.max_participations": 99},
            r"max_participations = 99: federation.mode 'fedbuff' samples no cohorts.*allowed: null",
        ),
        ({"federation.max_participations": 0}, r"federation.max_participations"),
        ({"federation.buffer": 3}, r"federation.buffer = 3 belongs to federation.mode 'fedbuff'"),
        ({"federation.mode": "fedbuff", "federation.deadline": 3.0}, "waits for nobody"),
        ({"federation.mode": "fedbuff", "federation.buffer": 99}, r"more than federation.clients"),
        ({"federation.min_updates": 9}, r"min_updates = 9 is more than the cohort of 8"),
        ({"simulation.dropout": 1.0}, r"simulation.dropout"),
        ({"runtime.min_client_actors": 3}, r"min_client_actors = 3 is more than"),
    ],
)
def test_what_cannot_close_a_round_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        experiment().with_values(values)
