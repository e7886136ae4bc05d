"""Every key that describes the method reaches the place where it counts."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedlpp_ray.config import Experiment, FederationConfig
from fedlpp_ray.federation import Federation, RoundRecord, preflight
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.records import Evaluation, Floor
from fedlpp_ray.federation.results import run_protection
from fedlpp_ray.federation.sampling import sample_cohort
from fedlpp_ray.tasks import load_task
from tests import tiny
from tests.federation.test_loop import cohort

BASE = {"federation.rounds": 1, "downlink.bits": 2, "client.base_bits": 3}


def digest(experiment: Experiment) -> str:
    backend = InProcess(experiment)
    clients = range(experiment.federation.cohort_size)
    reports = list(backend.train(1, cohort(1, *clients), {1: backend.encode_broadcast(1, clients)}))
    assert all(report.fault is None for report in reports)
    return backend.aggregate(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.alpha", 4.0),
        ("lora.dropout", 0.5),
        ("lora.targets", ["query", "value", "key"]),
        ("lora.modules_to_save", ["pooler"]),
        ("downlink.bits", "ternary"),
        ("downlink.kind", "lloyd-max"),
        ("downlink.block", 16),
        ("downlink.scale", "double"),
        ("downlink.rounding", "stochastic"),
        ("downlink.dither", "run"),
        ("downlink.dither", "round"),
        ("downlink.magnitude", "norm"),
        ("downlink.full_precision_head", True),
        ("client.base_bits", 8),
        ("client.base_kind", "int"),
        ("client.base_block", 16),
        ("client.base_scale", "double"),
        ("client.base_format", "bitsandbytes"),
        ("client.lr", 1e-3),
        ("client.weight_decay", 0.5),
        ("client.batch_size", 4),
        ("client.optimizer", "sgd"),
        ("client.schedule", "cosine"),
        ("client.warmup", 0.5),
        ("client.proximal", 5.0),
        ("client.group_by_length", True),
        ("client.compute", "bf16"),
        ("downlink.factors", "B"),
        ("downlink.rotate", "round"),
        ("downlink.rotate", "client"),
        ("downlink.perturbation", 0.5),
        ("downlink.server_mask", 0.1),
        ("downlink.client_mask", 0.1),
        ("uplink.bits", 4),
        ("uplink.bits", "bf16"),
        ("lora.client_ranks", [2, 4]),
        ("federation.clients", 9),
        ("federation.local_steps", 5),
        ("federation.partition", "dirichlet"),
        ("federation.partition", "quantity"),
        ("server.rule", "replace"),
        ("server.lr", 0.5),
        ("server.optimizer", "fedadagrad"),
        ("server.aggregation", "rolora"),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"client.optimizer": "sgd"}, "client.momentum", 0.5),
        ({"client.schedule": "cosine"}, "client.schedule", "linear"),
        ({}, "client.round_schedule", "linear"),
        ({"server.optimizer": "fedavgm"}, "server.momentum", 0.5),
        ({"server.optimizer": "fedadam"}, "server.beta1", 0.5),
        ({"server.optimizer": "fedyogi"}, "server.beta2", 0.5),
        ({"server.optimizer": "fedadam"}, "server.tau", 0.1),
        ({"server.optimizer": "fedadam"}, "server.optimizer", "fedyogi"),
        ({"downlink.kind": "int"}, "downlink.dither", "subtractive-run"),
        ({"uplink.bits": 4}, "uplink.kind", "nf"),
        ({"uplink.bits": 4}, "uplink.block", 16),
        ({"uplink.bits": 4}, "uplink.scale", "fp16"),
        ({"uplink.bits": 4}, "uplink.rounding", "stochastic"),
        ({"uplink.bits": 2}, "uplink.error_feedback", True),
        ({"server.aggregation": "flora"}, "server.send_residual", True),
        ({}, "downlink.every", 2),
        ({}, "downlink.hysteresis", 0.5),
        ({}, "downlink.hold_scales", True),
        ({"server.weighting": "uniform"}, "server.robust", "median"),
        ({"server.robust": "trimmed-mean", "server.byzantine": 1}, "server.byzantine", 2),
    ],
)
def test_a_key_that_needs_another_or_a_second_round_changes_the_state(
    tiny_experiment: Experiment, given: dict[str, object], key: str, value: object
) -> None:
    values = {"federation.rounds": 2, "federation.client_fraction": 1.0}
    base = tiny_experiment.with_values(values | {"federation.local_steps": 3} | given)
    digests = []
    for experiment in (base, base.with_values({key: value})):
        digests.append(list(Federation(experiment, InProcess(experiment)).run())[-1].digest)
    assert digests[0] != digests[1]


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
    other = tiny_experiment.with_values({"seed": 1})
    shares = [FederatedText(e).partition.indices(0).tolist() for e in (tiny_experiment, other)]
    assert shares[0] != shares[1]
    cohorts = [[sample_cohort(e.federation, e.seed, r) for r in range(5)] for e in (other, other)]
    assert cohorts[0] == cohorts[1]
    assert cohorts[0] != [sample_cohort(other.federation, 0, r) for r in range(5)]
    host = InProcess(tiny_experiment)._host
    losses = []
    for experiment in (tiny_experiment, other):
        host._experiment = experiment
        host.measure_floor()  # leaves a known state behind
        losses.append(host._train_client(1, 0, ()))
    assert losses[0] != losses[1]


# Clients by a key of the data


@pytest.fixture
def natural_experiment(tiny_experiment: Experiment, tmp_path: Path) -> Experiment:
    """Users of 120, 60, 30 and 6 examples; the three largest are clients."""
    users = ["c"] * 120 + ["a"] * 60 + ["b"] * 30 + ["rare"] * 6
    rows = tiny.make_rows(len(users))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "user"])
        writer.writeheader()
        writer.writerows(row | {"user": user} for row, user in zip(rows, users, strict=True))
    return tiny_experiment.with_values(
        {
            "task.data": str(tmp_path / "data.csv"),
            "task.held_out": 16,
            "task.key_column": "user",
            "federation.partition": "natural",
            "federation.clients": 3,
        }
    )


def test_natural_clients_train_on_their_own_text(natural_experiment: Experiment) -> None:
    text = FederatedText(natural_experiment)
    users = sorted(set(load_task(natural_experiment.task).train.keys or ()))
    for client, user in enumerate("abc"):
        own = text.partition.indices(client)
        assert {users[text._train.keys[i]] for i in own} == {user}
        expected = [text._train.labels[i] for i in own]
        assert [label for _, label in text.client(client)] == expected
        assert text.examples[client] == len(expected)
    assert text.strongest == 2
    json.dumps(list(text.examples))  # they travel in messages and results as plain numbers
    history = list(Federation(natural_experiment, InProcess(natural_experiment)).run())
    assert len(history) == natural_experiment.federation.rounds


def test_examples_that_no_client_has_are_said_once(
    natural_experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    others = [natural_experiment.with_values({"seed": seed}) for seed in (0, 1)]
    preflight.check(others)
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.message]
    left = len(FederatedText(natural_experiment).partition.order) - sum(
        FederatedText(natural_experiment).examples
    )
    assert 0 < left <= 6
    assert line.startswith(f"{left} of 200 training examples are left out")
    caplog.clear()
    preflight.check([natural_experiment.with_values({"federation.partition": "iid"})])
    assert "left out" not in caplog.text


def test_the_strongest_is_the_first_of_the_largest(tiny_experiment: Experiment) -> None:
    text = FederatedText(tiny_experiment.with_values({"federation.clients": 6}))
    assert list(text.examples) == [54, 54, 53, 53, 53, 53]
    assert text.strongest == 0


# Cohorts


def test_uniform_cohorts_keep_their_bits() -> None:
    """Taken from the first version: results depend on them."""
    cohorts = [sample_cohort(FederationConfig(clients=20), 0, round) for round in range(4)]
    assert cohorts == [(2, 5, 15, 16), (10, 13, 14, 17), (4, 5, 8, 15), (5, 12, 16, 17)]
    sizes = list(range(1, 21))
    assert sample_cohort(FederationConfig(clients=20, cohort=4), 0, 1, sizes) == cohorts[1]


def test_weighted_cohorts_are_drawn_one_after_the_other_in_proportion_to_size() -> None:
    """Against the probability of each pair, by definition of drawing without replacement."""
    sizes, rounds = [1, 2, 3, 6], 6000
    config = FederationConfig(clients=4, cohort=2, sampling="examples")
    found = Counter(sample_cohort(config, 0, round, sizes) for round in range(rounds))
    total = sum(sizes)
    for a, b in itertools.combinations(range(4), 2):
        x, y = sizes[a], sizes[b]
        chance = x / total * y / (total - x) + y / total * x / (total - y)
        noise = (rounds * chance * (1 - chance)) ** 0.5
        assert abs(found[(a, b)] - rounds * chance) < 4 * noise
    assert sum(found.values()) == rounds


def test_weighted_cohorts_of_a_million_depend_on_seed_and_round() -> None:
    config = FederationConfig(clients=10**6, cohort=100, sampling="examples", min_examples=1)
    sizes = np.ones(10**6, np.int64)
    sizes[:1000] = 10**6
    cohort = sample_cohort(config, 3, 1, sizes)
    assert len(set(cohort)) == 100
    assert list(cohort) == sorted(cohort)
    assert sum(client < 1000 for client in cohort) > 90
    assert all(type(client) is int for client in cohort)
    assert sample_cohort(config, 3, 1, sizes) == cohort
    assert sample_cohort(config, 3, 2, sizes) != cohort
    assert sample_cohort(config, 4, 1, sizes) != cohort


def test_all_clients_can_be_sampled_and_weights_need_their_sizes() -> None:
    config = FederationConfig(clients=3, cohort=3, sampling="examples")
    assert sample_cohort(config, 0, 1, [5, 1, 9]) == (0, 1, 2)
    for sizes in (None, [5], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match="needs the size of each client"):
            sample_cohort(config, 0, 1, sizes)


def test_broadcast_noise_is_fresh_each_round(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"downlink.rounding": "stochastic"})
    backend = InProcess(experiment)
    one, two = (backend.encode_broadcast(r)[experiment.lora.rank] for r in (1, 2))
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
    measured = Evaluation({"utility": server}, {"utility": before}, {"utility": after})
    return RoundRecord(number, measured, (), {}, "")


def test_protection_is_against_the_best_model_of_any_round() -> None:
    history = [record(1, 0.5, 0.85, 0.4), record(2, 0.9, 0.6, 0.7)]
    floor = Floor({"utility": 0.2}, {"utility": 0.5}, client=0, examples=1)
    protection = run_protection(history, floor)
    assert protection.strongest == ("client_before of round 1", 0.85)
    assert protection.server == 0.9
    assert protection.floor == ("local_only", 0.5)
    assert protection.value == pytest.approx(0.05 / 0.4)


def test_the_last_round_is_always_evaluated(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"evaluation.every": 2})
    history = list(Federation(experiment, InProcess(experiment)).run())
    assert [r.evaluation is not None for r in history] == [False, True, True]
