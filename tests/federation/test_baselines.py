"""FedSP and offsite-tuning as whole federations."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel

from benchmarks import offsite
from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, checkpoint, preflight
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.in_process import InProcess, in_process
from fedlpp_ray.federation.server import Server
from fedlpp_ray.lora import save_adapter, trainable
from fedlpp_ray.models import PackedLinear, load_tokenizer
from fedlpp_ray.tasks import Encoded, Examples, collate, load_task, set_aside
from tests import tiny
from tests.federation.test_loop import Recording, interrupted, numbers, run, tensor_bytes

FEDSP = {
    "adapter.kind": "prompt",
    "adapter.tokens": 5,
    "emulator.kind": "shared-layer",
    "emulator.steps": 3,
    "server.examples": 60,
}
OFFSITE = {
    "adapter.kind": "layers",
    "adapter.outer": 1,
    "emulator.kind": "layer-drop",
    "emulator.keep": 1,
    "emulator.steps": 3,
    "server.examples": 60,
}
BOTH = pytest.mark.parametrize("values", [FEDSP, OFFSITE], ids=["fedsp", "offsite"])


@pytest.fixture(scope="module")
def deep(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """On four layers, with an exact downlink."""
    model = tiny.make_model(tmp_path_factory.mktemp("deep") / "model", layers=4, dropout=0.0)
    return tiny_experiment.with_values({"model.name": str(model), "downlink.bits": 32})


HEAD = 3 * 64 + 3
LAYER = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 2 * 2 * 64
"""Attention's four maps, the two of the feed-forward, two norms."""


@pytest.mark.parametrize(
    ("values", "state"),
    [(FEDSP, 5 * 64 + HEAD), (OFFSITE, 2 * LAYER + HEAD)],
    ids=["fedsp", "offsite"],
)
def test_the_bytes_are_those_counted_by_hand(
    deep: Experiment, values: dict[str, object], state: int
) -> None:
    experiment = deep.with_values(values)
    backend = Recording(experiment)
    history = list(Federation(experiment, backend).run())
    emulator, seen = backend._server.emulator(), set()
    assert emulator is not None
    words = len((Path(experiment.model.name) / "vocab.txt").read_text().split())
    beside = (words + 32 + 2 + 2) * 64 + 64 * 64 + 64  # embeddings, their norm, the pooler
    assert tensor_bytes(emulator) == 4 * (beside + LAYER)  # of either kind one layer
    for record in history:
        (payload,) = backend.sent[record.round].values()
        assert tensor_bytes(payload) == 4 * state
        for transfer, update in zip(record.ledger, backend.received[record.round], strict=True):
            assert tensor_bytes(update) == 4 * state
            once = 0 if transfer.client in seen else len(emulator)
            assert transfer.down == len(payload) + once
            assert transfer.up == len(update)
            seen.add(transfer.client)


@BOTH
def test_an_interrupted_run_gives_the_same_bits(
    deep: Experiment, tmp_path: Path, values: dict[str, object]
) -> None:
    """The emulator is made again, and who had it is known from the history."""
    whole, restored = interrupted(deep.with_values(values), tmp_path, after=1)
    assert numbers(restored.history) == numbers(whole.history)
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == (values is FEDSP)


@BOTH
@pytest.mark.parametrize("method", ["federated", "local-only"])
def test_an_emulator_is_distilled_on_the_servers_texts_alone(
    deep: Experiment, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], method: str
) -> None:
    experiment = deep.with_values(values | {"method": method})
    read: list[list[int]] = []

    def note(_teacher, _emulator, _config, _outer, texts, **_) -> list[float]:
        read.extend(ids.tolist() for ids, _ in texts)
        return [1.0]

    monkeypatch.setattr("fedlpp_ray.federation.emulation.distill", note)
    in_process(experiment)
    text = FederatedText(experiment)
    own, _ = set_aside(load_task(experiment.task).train, experiment.server.examples)
    assert isinstance(own, Examples)
    found = load_tokenizer(experiment.model)(list(own.texts), max_length=16, truncation=True)
    assert read == found["input_ids"]
    clients = [ids.tolist() for ids, _ in text.pooled()]
    assert sum(map(clients.count, read)) < len(read) / 4  # a few texts come twice by chance


def test_an_emulator_that_drops_nothing_is_no_emulator(deep: Experiment) -> None:
    layers = deep.with_values({"adapter.kind": "layers"})
    whole = layers.with_values({"emulator.kind": "layer-drop", "emulator.keep": 2})
    without, with_it = run(layers), run(whole)
    assert [r.digest for r in with_it] == [r.digest for r in without]
    assert [r.evaluation for r in with_it] == [r.evaluation for r in without]
    assert with_it[-1].evaluation.client_before == with_it[-1].evaluation.server


@BOTH
def test_a_client_has_the_emulator_and_the_server_plugs_in(
    deep: Experiment, values: dict[str, object]
) -> None:
    experiment = deep.with_values(values)
    backend = InProcess(experiment)
    last = list(Federation(experiment, backend).run())[-1].evaluation
    assert last.client_before["loss"] != last.server["loss"]
    models = backend._server._model._model, backend._host._model
    assert set(trainable(models[0])) == set(trainable(models[1]))
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes[0] - sizes[1] == (3 if values is FEDSP else 1) * LAYER
    # What is frozen at the client is the emulator's, distilled by three steps.
    sent = safetensors.torch.load(backend._server.emulator())
    held = dict(backend._host._model.base_model.named_parameters())
    layer = "bert.encoder.layer.0" if values is FEDSP else "bert.encoder.layer.1"
    name = f"{layer}.output.dense.weight"
    assert torch.equal(held[name], sent[name])
    theirs = dict(backend._server._model._model.base_model.named_parameters())[name]
    assert not torch.equal(sent[name], theirs)


@pytest.mark.parametrize("kind", ["prompt", "layers"])
def test_a_federation_of_one_is_training_by_hand(
    deep: Experiment, tmp_path: Path, kind: str
) -> None:
    """On all its examples at once, with PEFT's own prompt, or the layers in a plain model."""
    one = {
        "adapter.kind": kind,
        "adapter.tokens": 5,
        "client.optimizer": "sgd",
        "client.lr": 0.1,
        "client.weight_decay": 0.0,
        "client.batch_size": 400,
        "federation.clients": 1,
        "federation.client_fraction": 1.0,
        "federation.rounds": 1,
        "federation.local_steps": 3,
    }
    experiment = deep.with_values(one)
    backend = InProcess(experiment)
    text = backend._server._text
    checkpoint.write_adapter(backend.adapter(), tmp_path)
    model = load_base(experiment, text)
    if kind == "prompt":
        model = PeftModel.from_pretrained(model, tmp_path)
        for name in ("prompt_encoder", "base_model.classifier"):
            model.get_submodule(name).requires_grad_(True)
    else:
        for name in ("classifier", "bert.encoder.layer.0", "bert.encoder.layer.3"):
            model.get_submodule(name).requires_grad_(True)
    model.eval()  # the tiny model has no dropout
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**collate(text.client(0), text.pad)).loss.backward()
        optimizer.step()
    list(Federation(experiment, backend).run())
    ours = safetensors.torch.load(backend.adapter()["adapter_model.safetensors"])
    before = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    if kind == "prompt":
        save_adapter(model, tmp_path)
        theirs = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    else:
        named = dict(model.named_parameters())
        theirs = {
            n: named[f"bert.encoder.{n.replace('layers', 'layer')}" if n[0] == "l" else n[11:]]
            for n in ours
        }
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name
        assert not torch.equal(tensor, before[name]) or name.endswith("key.bias"), name


def test_trained_layers_learn(deep: Experiment) -> None:
    """A prompt alone cannot make a random model read."""
    more = {"federation.rounds": 8, "federation.local_steps": 10, "evaluation.every": 8}
    experiment = deep.with_values(OFFSITE | more)
    (*_, last) = run(experiment)
    assert last.evaluation.server["accuracy"] > 0.9
    assert last.evaluation.client_before["accuracy"] > 0.9


@BOTH
def test_a_quantized_base_leaves_what_is_trained(
    deep: Experiment, values: dict[str, object]
) -> None:
    experiment = deep.with_values(values | {"client.base_bits": 4})
    host = ClientHost(experiment, emulator=Server(experiment).emulator())
    names = [n for n, m in host._model.named_modules() if isinstance(m, PackedLinear)]
    layers = {name.split(".encoder.layer.")[1][0] for name in names if ".encoder.layer." in name}
    assert layers == (set("0123") if values is FEDSP else {"1"})
    assert all(p.dtype == torch.float32 for p in trainable(host._model).values())


@BOTH
@pytest.mark.parametrize("method", ["centralised", "local-only"])
def test_runs_of_one_party_have_the_same_adapter(
    deep: Experiment, tmp_path: Path, values: dict[str, object], method: str
) -> None:
    experiment = deep.with_values(values | {"method": method})
    whole, restored = interrupted(experiment, tmp_path, after=2)
    assert numbers(restored.history) == numbers(whole.history)
    assert whole.history[-1].to_dict()["bytes"] == {"down": 0, "up": 0}
    if method == "local-only":
        floor = InProcess(deep.with_values(values)).measure_floor()
        assert whole.history[-1].evaluation.client_after == floor.local_only


@BOTH
def test_a_centralised_run_trains_the_servers_model_not_the_emulator(
    deep: Experiment, values: dict[str, object]
) -> None:
    sizes = {}
    for method in ("centralised", "local-only"):
        experiment = deep.with_values(values | {"method": method})
        sizes[method] = sum(p.numel() for p in in_process(experiment)._model.parameters())
    whole = sum(p.numel() for p in load_base(deep, FederatedText(deep)).parameters())
    prompt = 5 * 64 if values is FEDSP else 0
    assert sizes["centralised"] == whole + prompt
    assert sizes["local-only"] == whole + prompt - (3 if values is FEDSP else 1) * LAYER


def words(texts: Encoded) -> list[tuple[list[int], int]]:
    return [(ids.tolist(), label) for ids, label in texts]


def test_no_client_has_the_servers_examples(deep: Experiment) -> None:
    alone, shared = FederatedText(deep), FederatedText(deep.with_values({"server.examples": 60}))
    other = FederatedText(deep.with_values({"server.examples": 60, "seed": 5}))
    own = words(shared.servers())
    assert len(own) == 60
    assert words(other.servers()) == own
    assert sum(alone.examples) == 400 - 80
    assert sum(shared.examples) == 400 - 80 - 60
    assert sorted(own + words(shared.pooled())) == sorted(words(alone.pooled()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (FEDSP | {"server.examples": 0}, r"emulator.steps = 3 needs server.examples"),
        (FEDSP | {"server.examples": 320}, r"server.examples = 320, but there are only 320"),
        (FEDSP | {"server.aggregation": "flora"}, r"'flora' is made of LoRA's factors.* fedit"),
        (FEDSP | {"server.aggregation": "hetlora"}, "'hetlora' is made of LoRA's factors"),
        (FEDSP | {"server.aggregation": "rolora"}, "'rolora' is made of LoRA's factors"),
        (FEDSP | {"server.aggregation": "rolora", "federation.rounds": 1}, "'rolora' is made of"),
        (OFFSITE | {"server.aggregation": "rolora"}, "'rolora' is made of LoRA's factors"),
        (FEDSP | {"lora.client_ranks": [2, 4]}, r"lora.client_ranks .* adapter.kind 'prompt'"),
        (FEDSP | {"downlink.rotate": "round"}, r"downlink.rotate .* adapter.kind 'prompt'"),
        (OFFSITE | {"downlink.factors": "A"}, r"downlink.factors 'A' .* adapter.kind 'layers'"),
        (OFFSITE | {"emulator.kind": "shared-layer"}, r"'layers' with .* 'shared-layer'"),
        (OFFSITE | {"adapter.kind": "lora"}, r"adapter.kind 'lora' with .* 'layer-drop'"),
        (OFFSITE | {"adapter.outer": 2}, r"emulator.keep = 1: .* leaves 0"),
        (OFFSITE | {"emulator.kind": "none"}, r"emulator.steps = 3: emulator.kind 'none'"),
        ({"adapter.kind": "layers", "adapter.outer": 3}, r"adapter.outer = 3: .* at most 2"),
        (FEDSP | {"adapter.tokens": 17}, r"task.max_length \+ adapter.tokens = 33"),
    ],
)
def test_what_does_not_go_together_is_refused_first(
    deep: Experiment, values: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        preflight.check([deep.with_values(values)])


def test_other_adapters_go_with_what_is_not_lora_alone(deep: Experiment) -> None:
    """Lora with a shared layer; quantized prompts; optimisers of the server; SCAFFOLD."""
    quantized = {"downlink.bits": 4, "uplink.bits": 4, "uplink.error_feedback": True}
    scaffold = {"client.scaffold": True, "client.optimizer": "sgd", "server.optimizer": "fedadam"}
    for values in (
        FEDSP | {"adapter.kind": "lora"},
        FEDSP | quantized,
        OFFSITE | scaffold,
        OFFSITE | {"adapter.kind": "prompt", "adapter.tokens": 5},
    ):
        experiment = deep.with_values(values | {"federation.rounds": 2})
        preflight.check([experiment])
        assert len(run(experiment)) == 2


@pytest.mark.slow
@BOTH
def test_the_five_way_table(
    deep: Experiment, monkeypatch: pytest.MonkeyPatch, values: dict[str, object]
) -> None:
    """By the loss, in which the five differ; accuracies after so few steps are the same."""
    experiment = deep.with_values(values)
    last = run(experiment)[-1].evaluation
    assert offsite._utility(last.server) == last.server["accuracy"]
    monkeypatch.setattr(offsite, "_utility", lambda metrics: metrics["loss"])
    rows = offsite.measure(experiment)
    assert list(rows) == ["zero-shot", "emulator", "fine-tune", "emulator fine-tuned", "plug-in"]
    assert len(set(rows.values())) == 5
    assert rows["plug-in"] == last.server["loss"]
    assert rows["emulator fine-tuned"] == last.client_before["loss"]
    assert rows["emulator"] == InProcess(experiment).measure_floor().base["loss"]
    central = experiment.with_values({"method": "centralised"})
    assert (
        rows["fine-tune"]
        == list(Federation(central, in_process(central)).run())[-1].evaluation.server["loss"]
    )
    assert rows["zero-shot"] == Server(experiment).evaluate()["loss"]
    assert "| plug-in |" in offsite.markdown(rows)
    with pytest.raises(ConfigError, match=r"emulator.kind 'none'"):
        offsite.measure(deep)


def test_a_resumed_run_refuses_another_emulator_than_clients_have(
    tiny_experiment: Experiment,
) -> None:
    values = {
        "adapter.kind": "prompt",
        "adapter.tokens": 4,
        "emulator.kind": "shared-layer",
        "emulator.steps": 2,
        "server.examples": 40,
    }
    experiment = tiny_experiment.with_values(values)
    files = InProcess(experiment).adapter()
    InProcess(experiment).restore(files)
    other = InProcess(experiment.with_values({"emulator.lr": 1e-3}))
    with pytest.raises(ValueError, match="emulator made here is not that"):
        other.restore(files)
