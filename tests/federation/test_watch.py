"""What a run measures of its own leak, while it goes on."""

from __future__ import annotations

from typing import get_args

import pytest

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.config.adversary import Watched
from fedlpp_ray.federation import Federation, RoundRecord
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.federation.records import Evaluation
from fedlpp_ray.federation.results import leak_of
from fedlpp_ray.federation.watch import Watch
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy.attacks import ATTACKS, find_attacks

ALL = {"adversary.watch": list(get_args(Watched)), "adversary.watch_every": 1}


@pytest.fixture(scope="module")
def coarse(tiny_experiment: Experiment) -> Experiment:
    values = {"downlink.bits": 2, "federation.local_steps": 2, "federation.rounds": 4}
    return tiny_experiment.with_values(values)


def run(experiment: Experiment) -> tuple[list[RoundRecord], dict[int, Broadcast]]:
    sent: dict[int, Broadcast] = {}
    federation = Federation(experiment, InProcess(experiment), sent.__setitem__)
    return list(federation.run()), sent


@pytest.mark.parametrize("values", [{}, {"downlink.hysteresis": 0.5, "downlink.every": 2}])
def test_the_ladder_finds_the_same_in_the_finished_run(
    coarse: Experiment, values: dict[str, object]
) -> None:
    experiment = coarse.with_values(ALL | values)
    history, sent = run(experiment)
    ladder, attacks = Ladder(experiment, sent, history), find_attacks(list(get_args(Watched)))
    made = [each.made for each in ladder.view.received]
    for record in history:
        assert record.evaluation is not None
        seen = sum(m <= experiment.downlink.made_in(record.round + 1) for m in made)
        expected = {each.attack: each.metrics for each in ladder.run(attacks, seen)}
        assert record.evaluation.leak == expected


def test_a_run_that_watches_sends_the_same_bits(coarse: Experiment) -> None:
    watched, sent = run(coarse.with_values(ALL))
    plain, sent_plain = run(coarse.with_values({"adversary.watch": []}))
    assert sent == sent_plain
    assert [record.digest for record in watched] == [record.digest for record in plain]
    assert all(record.evaluation and not record.evaluation.leak for record in plain)


def test_the_window_is_of_the_newest(coarse: Experiment) -> None:
    two, _ = run(coarse.with_values(ALL | {"adversary.watch_window": 2}))
    one, _ = run(coarse.with_values(ALL | {"adversary.watch_window": 1}))
    whole, _ = run(coarse.with_values(ALL))
    last = [history[-1].evaluation for history in (one, two, whole)]
    assert all(each is not None for each in last)
    found = [each.leak["mean-factors"]["loss"] for each in last if each]
    assert len(set(found)) == 3
    assert last[0] is not None
    assert last[0].client_before is not None
    assert found[0] == last[0].client_before["loss"]


@pytest.mark.parametrize(
    ("every", "watch_every", "rounds"),
    [(1, 5, [5, 10, 12]), (2, 5, [6, 10, 12]), (5, 5, [5, 10, 12]), (7, 5, [7, 12])],
)
def test_it_is_measured_in_so_many_rounds_once_and_after_the_last(
    coarse: Experiment, every: int, watch_every: int, rounds: list[int]
) -> None:
    values = {"federation.rounds": 12, "evaluation.every": every}
    experiment = coarse.with_values(values | {"adversary.watch_every": watch_every})
    watch = Watch(experiment, [4] * 8)
    evaluated = [r for r in range(1, 13) if r % every == 0 or r == 12]
    assert [r for r in evaluated if watch.due(r)] == rounds


def test_attacks_that_are_arithmetic_and_leave_factors_can_be_watched(coarse: Experiment) -> None:
    arithmetic = {n for n, known in ATTACKS.items() if known.level == "broadcast"}
    arithmetic -= {"mean-final"}  # of more broadcasts than a run keeps
    dense = {name for name in arithmetic if name.endswith("-full")}
    assert set(get_args(Watched)) == arithmetic - {"last-broadcast", "best-broadcast"} - dense
    with pytest.raises(ConfigError, match=r"adversary\.watch"):
        coarse.with_values({"adversary.watch": ["tuned"]})


def test_the_strongest_counts_the_newest_broadcast_and_not_what_has_diverged() -> None:
    leak = {"trend": {"utility": float("nan")}, "interval": {"utility": 0.6}}
    evaluation = Evaluation(None, {"utility": 0.7}, None, leak)
    assert leak_of(RoundRecord(1, evaluation, (), {}, "")) == ("client_before", 0.7)
    assert leak_of(RoundRecord(1, Evaluation(None, {"utility": 0.7}, None), (), {}, "")) is None
