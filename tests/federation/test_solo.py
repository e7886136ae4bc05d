"""The ceiling and the floor as runs of their own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.in_process import InProcess, in_process
from fedlpp_ray.federation.results import result
from fedlpp_ray.federation.solo import Solo
from fedlpp_ray.seeds import derive
from fedlpp_ray.tracking.metrics import final_metrics, round_metrics
from tests.federation.test_loop import interrupted, numbers, run


def solo(experiment: Experiment, method: str) -> Experiment:
    return experiment.with_values({"method": method})


@pytest.mark.parametrize("bits", [2, 32])
def test_a_local_only_run_ends_at_the_floor(tiny_experiment: Experiment, bits: int) -> None:
    experiment = tiny_experiment.with_values({"client.base_bits": bits})
    floor = InProcess(experiment).measure_floor()
    (*_, last), backend = run_solo(solo(experiment, "local-only"))
    assert last.evaluation.client_after == floor.local_only
    assert last.evaluation.server is None
    assert backend.measure_floor() == floor


def run_solo(experiment: Experiment):
    backend = in_process(experiment)
    assert isinstance(backend, Solo)
    return list(Federation(experiment, backend).run()), backend


def test_a_federation_of_one_is_a_centralised_run(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client with all examples, one round, nothing quantized, the same order of examples."""
    one = tiny_experiment.with_values(
        {
            "federation.clients": 1,
            "federation.client_fraction": 1.0,
            "federation.rounds": 1,
            "downlink.bits": 32,
        }
    )
    (federated,) = run(one)
    monkeypatch.setattr(
        "fedlpp_ray.federation.solo.derive", lambda seed, *_: derive(seed, "local", 1, 0)
    )
    (centralised,), _ = run_solo(solo(one, "centralised"))
    assert centralised.loss == federated.loss
    assert centralised.evaluation.server == pytest.approx(federated.evaluation.server, abs=1e-6)


def test_a_centralised_run_learns_more_than_a_client_alone(tiny_experiment: Experiment) -> None:
    values = {"federation.rounds": 8, "federation.local_steps": 10, "evaluation.every": 8}
    experiment = tiny_experiment.with_values(values)
    (*_, last), backend = run_solo(solo(experiment, "centralised"))
    floor = backend.measure_floor()
    assert last.evaluation.server["accuracy"] > floor.local_only["accuracy"]
    assert last.evaluation.server["accuracy"] > 0.9
    assert last.evaluation.client_before is None


def test_it_makes_as_many_steps_as_the_cohorts_together(tiny_experiment: Experiment) -> None:
    backend = in_process(solo(tiny_experiment, "centralised"))
    seen = []
    backend._training._schedule.step = lambda: seen.append(1)  # type: ignore[method-assign]
    list(Federation(solo(tiny_experiment, "centralised"), backend).run())
    assert len(seen) == 3 * 4 * 4  # rounds, clients of a cohort, local steps


def test_nothing_travels_and_protection_is_undefined(tiny_experiment: Experiment) -> None:
    for method, reason in {
        "centralised": "no client takes part",
        "local-only": "the server has no model",
    }.items():
        experiment = solo(tiny_experiment, method)
        history, backend = run_solo(experiment)
        outcome = result(experiment, history, backend.measure_floor())
        assert outcome["protection"]["value"] is None
        assert outcome["protection"]["reason"] == reason
        metrics = round_metrics(history) | final_metrics(outcome)
        assert metrics["bytes/total"] == 0
        assert math.isnan(metrics["strongest_client"]) == (method == "centralised")


@pytest.mark.parametrize("method", ["centralised", "local-only"])
def test_an_interrupted_run_gives_the_same_bits(
    tiny_experiment: Experiment, tmp_path: Path, method: str
) -> None:
    """With dropout, whose random numbers must go on too, and learning rates that rise and fall."""
    values = {"lora.dropout": 0.3, "client.schedule": "linear", "client.warmup": 0.1}
    experiment = solo(tiny_experiment.with_values(values), method)
    whole, restored = interrupted(experiment, tmp_path, after=1)
    assert numbers(whole.history) == numbers(restored.history)


def test_training_in_parts_is_training_in_one(tiny_experiment: Experiment) -> None:
    experiment = solo(tiny_experiment.with_values({"client.schedule": "linear"}), "centralised")
    once = in_process(experiment)
    loss = once._training.advance(6)
    parts = in_process(experiment)
    losses = [parts._training.advance(n) for n in (1, 3, 2)]
    assert loss == pytest.approx((losses[0] + 3 * losses[1] + 2 * losses[2]) / 6)
    one, other = once.adapter(), parts.adapter()
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    assert torch.equal(once._training._random[0], parts._training._random[0])


EMULATOR = {
    "adapter.kind": "prompt",
    "emulator.kind": "shared-layer",
    "emulator.steps": 2,
    "server.examples": 40,
}


@pytest.mark.parametrize("values", [{}, EMULATOR], ids=["base", "emulator"])
def test_the_floor_is_that_of_a_client_whatever_the_method(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    """Of the client's own base, quantized or emulated, which is not the centralised run's."""
    experiment = tiny_experiment.with_values(
        values | {"client.base_bits": 2, "adapter.tokens": 5, "client.lr": 0.1}
    )
    methods = ("federated", "local-only", "centralised")
    backends = {method: in_process(solo(experiment, method)) for method in methods}
    floors = {method: backend.measure_floor() for method, backend in backends.items()}
    assert floors["federated"] == floors["local-only"] == floors["centralised"]
    whole = InProcess(tiny_experiment.with_values({"client.lr": 0.1})).measure_floor()
    assert whole.base["loss"] != floors["federated"].base["loss"]


@pytest.mark.parametrize("method", ["centralised", "local-only"])
def test_measuring_the_floor_leaves_the_run_as_it_was(
    tiny_experiment: Experiment, method: str
) -> None:
    backend = in_process(solo(tiny_experiment, method))
    backend._training.advance(2)
    before = backend.adapter()
    backend.measure_floor()
    assert backend.adapter() == before


@pytest.mark.parametrize("method", ["centralised", "local-only"])
def test_rates_fall_from_round_to_round_within_one_training(
    tiny_experiment: Experiment, method: str
) -> None:
    """Linear over three rounds: 1, 2/3, 1/3 of client.lr, for the steps of a round each."""
    experiment = solo(tiny_experiment.with_values({"client.round_schedule": "linear"}), method)
    backend = in_process(experiment)
    training, rates = backend._training, []
    training._optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"] / experiment.client.lr)
    )
    list(Federation(experiment, backend).run())
    steps = len(rates) // 3
    assert rates == pytest.approx([1.0] * steps + [2 / 3] * steps + [1 / 3] * steps)


@pytest.mark.parametrize("method", ["centralised", "local-only"])
def test_a_training_that_diverges_says_which_key_to_lower(
    tiny_experiment: Experiment, method: str
) -> None:
    values = {"client.optimizer": "sgd", "client.lr": 1e6}
    with pytest.raises(UserError, match=r"the training diverged \(client\.lr = 1e\+06\)"):
        run_solo(solo(tiny_experiment.with_values(values), method))


def test_ranks_of_clients_belong_to_federations(tiny_experiment: Experiment) -> None:
    values = {"lora.client_ranks": [2, 4], "server.aggregation": "flexlora"}
    experiment = solo(tiny_experiment.with_values(values), "local-only")
    with pytest.raises(ConfigError, match=r"lora\.client_ranks.*method 'local-only'"):
        preflight.check([experiment])


def test_a_client_alone_is_one_process(tiny_experiment: Experiment) -> None:
    several = tiny_experiment.with_values({"server.num_workers": 2})
    preflight.check([solo(several, "centralised")])
    with pytest.raises(ConfigError, match=r"server\.num_workers = 2, .*method 'local-only'"):
        preflight.check([solo(several, "local-only")])
