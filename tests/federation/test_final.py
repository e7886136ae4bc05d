"""What stays at the server: a final model that is never broadcast, and a corrected base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

from fedlpp_ray import attack, train
from fedlpp_ray.config import ConfigError, Experiment, dump_experiment
from fedlpp_ray.federation import Federation, checkpoint, preflight
from fedlpp_ray.federation.adapter import ADAPTER_STATE, adapter_state
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.emulation import load_client_base
from fedlpp_ray.federation.held import Held
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.federation.records import Final
from fedlpp_ray.federation.server import AVERAGE, CORRECTION
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy.attacks import find_attacks
from fedlpp_ray.state import State
from fedlpp_ray.tasks import evaluation_batches
from fedlpp_ray.tracking.metrics import final_metrics, metric_names, round_metrics
from fedlpp_ray.tracking.progress import protection_lines
from tests.federation.test_loop import numbers

AVERAGED = {"server.final_average": 3, "federation.rounds": 4}
TUNED = {"server.final_tune_steps": 4, "server.final_tune_lr": 1e-2, "server.examples": 24}
BRIEF = {"federation.local_steps": 1, "federation.client_fraction": 0.25}
COARSE = {"client.base_bits": 2, "downlink.bits": 4, "federation.rounds": 2}


class Run:
    """A finished run: what it sent, its states round by round, and its parties."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.backend = experiment, InProcess(experiment)
        self.sent: dict[int, Broadcast] = {}
        self.federation = Federation(experiment, self.backend, self.sent.__setitem__)
        self.states = [self._state() for _ in self.federation.run()]
        self.history = self.federation.history

    def _state(self) -> State:
        return safetensors.torch.load(self.backend.adapter()[ADAPTER_STATE])

    @property
    def final(self) -> Final:
        assert self.federation.final is not None
        return self.federation.final


@pytest.fixture(scope="module")
def plain(tiny_experiment: Experiment) -> Run:
    return Run(tiny_experiment.with_values({"federation.rounds": 4, "server.examples": 24}))


@pytest.fixture(scope="module")
def finished(tiny_experiment: Experiment) -> Run:
    return Run(tiny_experiment.with_values(AVERAGED | TUNED))


def test_without_the_options_there_is_no_final_model(plain: Run) -> None:
    assert plain.federation.final is None


def test_the_final_model_is_the_mean_of_the_last_states_and_tuning_moves_it(
    tiny_experiment: Experiment, plain: Run, finished: Run
) -> None:
    run = Run(tiny_experiment.with_values(AVERAGED | {"server.examples": 24}))
    found = safetensors.torch.load(run.final.adapter[ADAPTER_STATE])
    for name, tensor in found.items():
        expected = sum(state[name].double() for state in plain.states[1:]) / 3
        assert torch.equal(tensor, expected.float())
        assert not torch.equal(tensor, plain.states[-1][name])
    model = run.backend._server._model
    assert run.final.server == model.evaluate(adapter_state(dict(run.final.adapter), model.initial))
    assert finished.final.digest != run.final.digest
    assert finished.final.server != run.final.server


def test_the_rounds_are_as_they_are_without_it(plain: Run, finished: Run) -> None:
    assert numbers(finished.history) == numbers(plain.history)
    assert finished.sent == plain.sent
    assert finished.final.digest not in [record.digest for record in plain.history]


def test_a_round_that_was_abandoned_counts_with_the_state_that_it_left(
    tiny_experiment: Experiment,
) -> None:
    failing = {"simulation.dropout": 0.1, "federation.min_updates": 2}
    run = Run(tiny_experiment.with_values(AVERAGED | failing | BRIEF))
    assert {bool(record.folded) for record in run.history[1:]} == {True, False}
    for name, tensor in safetensors.torch.load(run.final.adapter[ADAPTER_STATE]).items():
        expected = sum(state[name].double() for state in run.states[1:]) / 3
        assert torch.equal(tensor, expected.float())


def test_resumed_after_any_round_it_is_the_same(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    backend = InProcess(tiny_experiment.with_values(AVERAGED | TUNED | BRIEF))
    federation = Federation(backend._server._experiment, backend)
    folders = []
    for record in federation.run():
        folders.append(tmp_path / str(record.round))
        folders[-1].mkdir()
        checkpoint.save(federation, folders[-1])
    assert federation.final is not None
    assert [(folder / "adapter" / AVERAGE).exists() for folder in folders] == [0, 1, 1, 1]
    for folder in reversed(folders):  # in the same server: what it has summed since is forgotten
        restored = Federation(federation.experiment, backend)
        checkpoint.restore(restored, folder)
        list(restored.run())
        assert restored.final == federation.final
        assert numbers(restored.history) == numbers(federation.history)


@pytest.fixture(scope="module")
def folder(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of a run with a final model."""
    made = tmp_path_factory.mktemp("final")
    experiment = tiny_experiment.with_values(AVERAGED | {"downlink.bits": 2})
    (made / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    options = ["--output", str(made / "run"), "--adapter", str(made / "adapter")]
    options += ["--tracking-uri", f"sqlite:///{made / 'mlflow.db'}", "--in-process"]
    assert train.main([str(made / "x.yaml"), *options]) == 0
    return made


@pytest.mark.slow
def test_protection_is_of_the_final_model_in_the_run_and_under_attack(folder: Path) -> None:
    outcome = json.loads((folder / "run" / "result.json").read_text())
    final, last = outcome["final"]["server"], outcome["history"][-1]["server"]
    assert final["loss"] != last["loss"]
    assert outcome["protection"]["server"] == final["utility"]
    assert attack.main([str(folder / "run"), "--attacks", "last-broadcast"]) == 0
    report = json.loads((folder / "run" / "attacks.json").read_text())
    assert report["protection"]["server"] == final["utility"]
    shown = "\n".join(protection_lines(outcome))
    assert f"threat    {outcome['threat']}" in shown
    assert outcome["threat"].startswith("adversary the strongest client, passive; architecture kn")
    words = f"server {final['utility']:.3f} (final model, never broadcast; after the last round"
    assert f"{words} {last['utility']:.3f})" in shown


def test_the_final_model_is_what_is_exported_and_logged(folder: Path) -> None:
    latest = folder / "run" / "checkpoints" / "round-000004"
    expected = (latest / "final" / ADAPTER_STATE).read_bytes()
    assert expected != (latest / "adapter" / ADAPTER_STATE).read_bytes()
    assert (folder / "adapter" / ADAPTER_STATE).read_bytes() == expected
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (logged,) = client.search_runs([client.get_experiment_by_name("train").experiment_id])
    outcome = json.loads((folder / "run" / "result.json").read_text())
    assert logged.data.metrics["final/utility"] == outcome["final"]["server"]["utility"]
    files = client.download_artifacts(logged.info.run_id, f"adapter/{ADAPTER_STATE}")
    assert Path(files).read_bytes() == expected


def test_its_numbers_have_names_that_a_search_knows(folder: Path) -> None:
    outcome = json.loads((folder / "run" / "result.json").read_text())
    experiment = Experiment.from_dict(outcome["config"])
    history = checkpoint.read_history(folder / "run" / "checkpoints" / "round-000004")
    found = round_metrics(history) | final_metrics(outcome)
    assert set(found) == set(metric_names(experiment))
    assert "final/accuracy" in found


def test_a_server_that_is_not_measured_has_its_final_model_all_the_same(
    tiny_experiment: Experiment,
) -> None:
    values = {"evaluation.server": False, "federation.rounds": 3, "server.final_average": 2}
    run = Run(tiny_experiment.with_values(values))
    assert run.final.server is None
    assert ADAPTER_STATE in run.final.adapter


# The corrected base.


@pytest.fixture(scope="module")
def coarse(tiny_experiment: Experiment, still_model: Path) -> Experiment:
    return tiny_experiment.with_values(COARSE | {"model.name": str(still_model)})


@pytest.fixture(scope="module")
def uncorrected(coarse: Experiment) -> Run:
    return Run(coarse)


def logits(experiment: Experiment, state: State) -> torch.Tensor:
    """Of the server's model with a state, on held-out texts."""
    server = InProcess(experiment)._server._model
    server._state.write(state)
    with server._corrected():
        return _logits(server._model, experiment)


def _logits(model: torch.nn.Module, experiment: Experiment) -> torch.Tensor:
    text = FederatedText(experiment)
    first, *_ = evaluation_batches(text.held_out()[0], text.pad, 32)
    with torch.no_grad():
        return model.eval()(**first).logits  # type: ignore[no-any-return]


def test_at_full_rank_the_servers_model_is_that_of_a_client(
    coarse: Experiment, uncorrected: Run
) -> None:
    state = uncorrected.states[-1]
    text = FederatedText(coarse)
    client = Held(coarse, load_client_base(coarse, text), torch.device("cpu"))
    client.state.write(state)
    expected = _logits(client.model, coarse)
    found = {
        rank: logits(coarse.with_values({"server.base_correction": rank}), state)
        for rank in (0, 32, 64)
    }
    assert torch.allclose(found[64], expected, atol=1e-4)
    distances = [float((each - expected).norm()) for each in found.values()]
    assert distances[0] > distances[1] > 100 * distances[2]


def test_a_correction_changes_nothing_that_is_sent(coarse: Experiment) -> None:
    """Not even where the server trains its state on."""
    trains = coarse.with_values({"server.tune_steps": 2, "server.examples": 24})
    plain, corrected = Run(trains), Run(trains.with_values({"server.base_correction": 64}))
    assert corrected.sent == plain.sent
    for found, expected in zip(corrected.history, plain.history, strict=True):
        assert found.digest == expected.digest
        assert found.evaluation is not None
        assert expected.evaluation is not None
        assert found.evaluation.client_after == expected.evaluation.client_after
        assert found.evaluation.server != expected.evaluation.server


@pytest.mark.parametrize("values", [{}, {"server.final_average": 2}], ids=["last", "final"])
def test_what_is_exported_with_it_is_the_model_that_was_measured(
    coarse: Experiment, values: dict[str, Any]
) -> None:
    experiment = coarse.with_values(values | {"server.base_correction": 16})
    run = Run(experiment)
    files = dict(run.final.adapter) if values else run.backend.adapter()
    text = FederatedText(experiment)
    base = load_base(experiment, text)
    tensors = safetensors.torch.load(files[CORRECTION])
    for layer in {name.rpartition(".")[0] for name in tensors}:
        linear: Any = base.get_submodule(layer)
        added = tensors[f"{layer}.left"] @ tensors[f"{layer}.right"]
        linear.weight = torch.nn.Parameter(linear.weight + added, requires_grad=False)
    held = Held(experiment, base, torch.device("cpu"))
    held.state.write(adapter_state(files, held.initial))
    last = run.history[-1].evaluation
    assert last is not None
    expected = run.final.server if values else last.server
    assert text.evaluate(held.model, torch.device("cpu")) == expected


def test_an_adversary_that_has_w0_corrects_it_too(coarse: Experiment) -> None:
    run = Run(coarse.with_values({"server.base_correction": 64}))
    attacks = find_attacks(["last-broadcast", "mean-factors"])
    ladder = Ladder(run.experiment.with_values({"adversary.max_looks": 1}), run.sent, run.history)
    found = {each.name: each.metrics for each in ladder.run(attacks)}
    assert len(found) == 6
    assert found["last-broadcast on W0 + R"]["loss"] == pytest.approx(
        found["last-broadcast"]["loss"], abs=1e-5
    )
    assert abs(found["last-broadcast on W0"]["loss"] - found["last-broadcast"]["loss"]) > 1e-3
    assert "tuned alone on W0 + R" in ladder.floor()
    secret = run.experiment.with_values({"adversary.base": "proprietary"})
    assert Ladder(secret, run.sent, run.history).bases == ("client",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server.final_average": 4}, "final_average = 4: there are federation.rounds = 3"),
        (
            {"server.final_average": 2, "server.aggregation": "flexlora"},
            "'flexlora' makes new factors of products",
        ),
        (
            {
                "server.final_average": 2,
                "server.aggregation": "fedsa-lora",
                "evaluation.server": False,
            },
            "leaves B at the clients",
        ),
        ({"server.final_tune_steps": 4}, "final_tune_steps = 4: needs server.examples above 0"),
        ({"server.base_correction": 4}, "client.base_bits 32 takes nothing"),
        (
            {
                "server.base_correction": 4,
                "client.base_bits": 4,
                "client.base_format": "bitsandbytes",
            },
            "allowed: packed",
        ),
        (
            {
                "server.base_correction": 4,
                "client.base_bits": 4,
                "emulator.kind": "layer-drop",
                "adapter.kind": "layers",
            },
            "emulator.kind 'layer-drop' gives clients another model",
        ),
        (
            {"server.base_correction": 4, "client.base_bits": 4, "server.zero.stage": 3},
            "server.zero.stage 3 spreads W0",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(
    tiny_experiment: Experiment, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check([tiny_experiment.with_values(values)])
