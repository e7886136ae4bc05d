"""Every key that describes the method reaches the place where it counts."""

from __future__ import annotations

import pytest

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation, RoundRecord
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.records import Evaluation, Floor
from fedlpp_ray.federation.results import run_protection

BASE = {"federation.rounds": 1, "downlink.bits": 2, "client.base_bits": 3}


def digest(experiment: Experiment) -> str:
    backend = InProcess(experiment)
    cohort = list(range(experiment.federation.cohort_size))
    broadcast = backend.encode_broadcast(1)
    return backend.aggregate(1, broadcast, backend.train(1, cohort, broadcast))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.alpha", 4.0),
        ("lora.dropout", 0.5),
        ("lora.targets", ["query", "value", "key"]),
        ("downlink.bits", "ternary"),
        ("downlink.kind", "lloyd-max"),
        ("downlink.block", 16),
        ("downlink.scale", "double"),
        ("downlink.rounding", "stochastic"),
        ("downlink.full_precision_head", True),
        ("client.base_bits", 8),
        ("client.base_kind", "int"),
        ("client.base_block", 16),
        ("client.base_scale", "double"),
        ("client.base_format", "bitsandbytes"),
        ("client.lr", 1e-3),
        ("client.weight_decay", 0.5),
        ("client.batch_size", 4),
        ("federation.clients", 9),
        ("federation.local_steps", 5),
        ("federation.partition", "dirichlet"),
        ("server.rule", "replace"),
        ("server.lr", 0.5),
        ("task.max_length", 4),
        ("seed", 1),
    ],
)
def test_a_changed_key_changes_the_state(
    tiny_experiment: Experiment, key: str, value: object
) -> None:
    # At 4 bits both formats train bit for bit the same; at 8 they are nf8 and int8.
    bits = {"client.base_bits": 8} if key == "client.base_format" else {}
    base = tiny_experiment.with_values(BASE | bits)
    assert digest(base.with_values({key: value})) != digest(base)


def test_weighting_counts_where_shares_are_uneven(tiny_experiment: Experiment) -> None:
    base = tiny_experiment.with_values(BASE | {"federation.partition": "dirichlet"})
    assert digest(base.with_values({"server.weighting": "uniform"})) != digest(base)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runtime.client_actors", 5),
        ("evaluation.every", 2),
        ("evaluation.batch_size", 7),
        ("client.dequantize_at_load", True),
    ],
)
def test_keys_of_convenience_change_nothing(
    tiny_experiment: Experiment, key: str, value: object
) -> None:
    base = tiny_experiment.with_values(BASE)
    assert digest(base.with_values({key: value})) == digest(base)


def test_the_seed_reaches_partition_cohort_and_local_training(tiny_experiment: Experiment) -> None:
    """Each on its own: the text of a client, who is sampled, and the order of its examples."""
    from fedlpp_ray.federation.data import FederatedText
    from fedlpp_ray.federation.sampling import sample_cohort

    other = tiny_experiment.with_values({"seed": 1})
    shares = [FederatedText(e)._parts[0].tolist() for e in (tiny_experiment, other)]
    assert shares[0] != shares[1]
    cohorts = [[sample_cohort(e.federation, e.seed, r) for r in range(5)] for e in (other, other)]
    assert cohorts[0] == cohorts[1]
    assert cohorts[0] != [sample_cohort(other.federation, 0, r) for r in range(5)]
    host = InProcess(tiny_experiment)._host
    losses = []
    for experiment in (tiny_experiment, other):
        host._experiment = experiment
        host.measure_floor()  # leaves a known state behind
        losses.append(host._train_client(1, 0, 3))
    assert losses[0] != losses[1]


def test_broadcast_noise_is_fresh_each_round(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"downlink.rounding": "stochastic"})
    backend = InProcess(experiment)
    one, two = (backend.encode_broadcast(r) for r in (1, 2))
    assert one.partition(b"}}")[2] != two.partition(b"}}")[2]


def test_the_floor_is_independent_of_the_run_and_trains_as_long(
    tiny_experiment: Experiment,
) -> None:
    fresh = InProcess(tiny_experiment).measure_floor()
    backend = InProcess(tiny_experiment)
    list(Federation(tiny_experiment, backend).run())
    assert backend.measure_floor() == fresh
    longer = tiny_experiment.with_values({"federation.rounds": 6})
    assert InProcess(longer).measure_floor().local_only != fresh.local_only
    # 3 rounds of 4 steps are 6 rounds of 2.
    same = tiny_experiment.with_values({"federation.rounds": 6, "federation.local_steps": 2})
    assert InProcess(same).measure_floor() == fresh


def record(number: int, server: float, before: float, after: float) -> RoundRecord:
    measured = Evaluation({"accuracy": server}, {"accuracy": before}, {"accuracy": after})
    return RoundRecord(number, measured, (), (), {}, "")


def test_protection_is_against_the_best_model_of_any_round() -> None:
    history = [record(1, 0.5, 0.85, 0.4), record(2, 0.9, 0.6, 0.7)]
    floor = Floor({"accuracy": 0.2}, {"accuracy": 0.5}, client=0, examples=1)
    protection = run_protection(history, floor)
    assert protection.strongest == ("client_before of round 1", 0.85)
    assert protection.server == 0.9
    assert protection.floor == ("local_only", 0.5)
    assert protection.value == pytest.approx(0.05 / 0.4)


def test_the_last_round_is_always_evaluated(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"evaluation.every": 2})
    history = list(Federation(experiment, InProcess(experiment)).run())
    assert [r.evaluation is not None for r in history] == [False, True, True]
