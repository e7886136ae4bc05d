"""A generation task through the whole federation, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import safetensors.torch

from fedlpp_ray.assets import AssetError
from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.results import result
from fedlpp_ray.tasks import TaskError
from fedlpp_ray.tracking.metrics import final_metrics, metric_names, round_metrics
from tests import tiny
from tests.federation.test_loop import interrupted, numbers

KEYS = ["north", "south", "east", "west"]


def rows(count: int) -> list[dict[str, str]]:
    """A topic to name what a thing is: to be learnt, the thing is copied."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        topic = rng.choice(list(tiny.TOPICS))
        word = rng.choice(tiny.TOPICS[topic])
        made.append({"thing": word, "extra": rng.choice(tiny.COMMON), "says": f"a {word} is near"})
        made[-1]["region"] = KEYS[i % 4]
    return made


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("generation")
    tiny.make_generator(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows(400))))
    return Experiment().with_values(
        {
            "model.name": str(folder / "model"),
            "task.name": "generation",
            "task.data": str(folder / "data.jsonl"),
            "task.prompt": "what is the {thing} , {extra}",
            "task.target": "{says}",
            "task.key_column": "region",
            "task.held_out": 24,
            "task.max_length": 16,
            "generation.max_new_tokens": 6,
            "generation.beams": 2,
            "lora.rank": 4,
            "lora.alpha": 16,
            "client.lr": 2e-2,
            "federation.clients": 4,
            "federation.client_fraction": 0.5,
            "federation.partition": "natural",
            "federation.rounds": 2,
            "federation.local_steps": 3,
        }
    )


def test_a_federation_learns_to_write(experiment: Experiment) -> None:
    values = {"federation.rounds": 6, "federation.local_steps": 25, "evaluation.every": 6}
    learning = experiment.with_values(values)
    preflight.check([learning])
    backend = InProcess(learning)
    history = list(Federation(learning, backend).run())
    last, floor = history[-1].evaluation, backend.measure_floor()
    assert last is not None
    assert last.server is not None
    assert last.server["bleu"] > 0.5 > floor.base["bleu"]
    assert last.server["perplexity"] < 2 < floor.base["perplexity"]
    found = round_metrics(history) | final_metrics(result(learning, history, floor))
    assert set(found) == set(metric_names(learning))
    assert found["server/utility"] == found["server/bleu"]


def test_clients_of_a_generation_task_are_its_keys(experiment: Experiment) -> None:
    text = InProcess(experiment)._host._text
    assert text.classes is None
    assert {len(text.client(client)) for client in range(4)} == set(text.examples)


def test_an_interrupted_run_gives_the_same_bits(experiment: Experiment, tmp_path: Path) -> None:
    whole, restored = interrupted(experiment, tmp_path, after=1)
    assert numbers(whole.history) == numbers(restored.history)


def test_only_adapters_travel(experiment: Experiment) -> None:
    names = InProcess(experiment)._server._state
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (
            {"task.max_length": 120, "generation.max_new_tokens": 16},
            AssetError,
            r"task.max_length \+ generation.max_new_tokens = 136.*128 positions",
        ),
        ({"generation.chat_template": True}, ValueError, "generation.chat_template"),
        (
            {"evaluation.utility": "accuracy"},
            ConfigError,
            "evaluation.utility = 'accuracy' is not measured.*allowed: bleu",
        ),
        (
            {"evaluation.utility": "bleu", "generation.examples": 0},
            ConfigError,
            "evaluation.utility = 'bleu'.*allowed: log_likelihood",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_compute(
    experiment: Experiment, values: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        preflight.check([experiment.with_values(values)])


def test_missing_packages_are_named(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "nltk" else known(n, *a)
    )
    with pytest.raises(TaskError, match=r"need nltk: pip install 'fedlpp_ray\[generation\]'"):
        preflight.check([experiment])


def test_a_classifier_is_refused_for_text(experiment: Experiment, tiny_model: Path) -> None:
    with pytest.raises(AssetError, match=r"model\.name"):
        preflight.check([experiment.with_values({"model.name": str(tiny_model)})])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["federated", "local-only"])
@pytest.mark.parametrize("kind", ["prompt", "layers"])
def test_a_generator_has_the_other_adapters_and_an_emulator(
    experiment: Experiment, tmp_path: Path, kind: str, method: str
) -> None:
    """Of four layers; nothing but a prompt, or the outer layers, travels: there is no head."""
    tiny.make_generator(tmp_path / "model", layers=4)
    values = {
        "method": method,
        "model.name": str(tmp_path / "model"),
        "adapter.kind": kind,
        "adapter.tokens": 5,
        "emulator.kind": "shared-layer" if kind == "prompt" else "layer-drop",
        "emulator.keep": 1,
        "emulator.steps": 2,
        "server.examples": 20,
    }
    ours = experiment.with_values(values)
    preflight.check([ours])
    (tmp_path / "run").mkdir()
    whole, restored = interrupted(ours, tmp_path / "run", after=1)
    assert numbers(restored.history) == numbers(whole.history)
    found = whole.history[-1].evaluation
    assert found is not None
    metrics = found.client_after
    assert metrics is not None
    assert "bleu" in metrics
    state = safetensors.torch.load(whole.backend.adapter()["adapter_model.safetensors"])
    if kind == "prompt":
        assert {name: tensor.shape for name, tensor in state.items()} == {
            "prompt_embeddings": (5, 64)
        }
    else:
        assert {name.split(".")[1] for name in state} == {"0", "3"}
