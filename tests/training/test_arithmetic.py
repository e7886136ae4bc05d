"""What a step and an evaluation leave out changes no result; bf16 changes it within bounds."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlpp_ray import cache
from fedlpp_ray.config import (
    ClientConfig,
    Experiment,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
)
from fedlpp_ray.lora import (
    ModelState,
    add_lora,
    add_residuals,
    merged,
    read_state,
    store_in_bf16,
    trainable,
    write_state,
)
from fedlpp_ray.models import Base, PackedLinear, quantize_base, share_base
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import State, part
from fedlpp_ray.tasks import IGNORED, Encoded, collate, epoch_order
from fedlpp_ray.training import (
    Training,
    classification_evaluator,
    device,
    predictions,
    smoothed_loss,
    write,
)
from tests import tiny

CPU = torch.device("cpu")
BERT = "bert"
FAMILIES = [BERT, "llama", "gpt2", "qwen3"]
BASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"base_bits": 4},
    "bitsandbytes 4": {"base_bits": 4, "base_format": "bitsandbytes"},
    "bitsandbytes 8": {"base_bits": 8, "base_format": "bitsandbytes"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {name: tiny.make_generator(root / name, family=name) for name in FAMILIES[1:]}
    return made | {BERT: tiny.make_model(root / BERT)}


def adapted(folder: Path, base: str = "dense", targets: tuple[str, ...] | None = None) -> nn.Module:
    """A model with LoRA whose factors are not zero."""
    torch.manual_seed(1)
    if folder.name == BERT:
        plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder)
    frozen = quantize_base(plain.requires_grad_(False).eval(), ClientConfig(**BASES[base]))
    model: nn.Module = add_lora(frozen, LoraConfig(rank=4, targets=targets), seed=0)
    random = torch.Generator().manual_seed(2)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=random)
        for name, tensor in read_state(model).items()
    }
    write_state(model, state)
    return model


def examples(family: str, count: int = 12) -> Encoded:
    random = torch.Generator().manual_seed(3)
    found: Encoded = []
    for i in range(count):
        ids = torch.randint(5, 20, (4 + i % 7,), generator=random)
        text = torch.cat((torch.full((3,), IGNORED), ids[3:]))
        found.append((ids, i % 3 if family == BERT else text))
    return found


def training(model: nn.Module, family: str, **options: Any) -> Training:
    config = ClientConfig(lr=1e-2, batch_size=4, **options)
    return Training(model, examples(family), config, steps=4, seed=0, pad=0, device=CPU)


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        return predictions(model.eval(), collate(examples(family), 0), CPU)[0].float()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# Evaluation without the adapter's branch


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_gives_the_same_logits_and_comes_back_untouched(
    folders: dict[str, Path], family: str, base: str, residual: bool
) -> None:
    """Relative to the largest logit, within 1e-5: fp32 sums in another order."""
    model = adapted(folders[family], base)
    if residual:
        add_residuals(model)
        state = read_state(model)
        write_state(model, {n: t + 0.1 * (part(n) == "residual") for n, t in state.items()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, expected = dict(model.named_modules()), logits(model, family)
    with merged(model):
        assert not any(isinstance(module, LoraLayer) for module in model.modules())
        found = logits(model, family)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert same(before, model.state_dict())
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_a_merged_model_writes_the_same_text(folders: dict[str, Path], base: str) -> None:
    model, prompts = adapted(folders["llama"], base), [[5, 9, 7], [6, 5, 4, 8], [10]]
    config = GenerationConfig(beams=3, no_repeat_ngram=2, max_new_tokens=6)
    options: dict[str, Any] = {"pad": 0, "stop": [3], "batch_size": 2, "device": CPU}
    expected = write(model.eval(), prompts, config, **options)
    with merged(model):
        assert write(model, prompts, config, **options) == expected
    assert any(expected)


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_an_evaluation_reads_the_merged_model(
    folders: dict[str, Path], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, evaluate = (
        adapted(folders[BERT], base),
        classification_evaluator(examples(BERT), 0, Experiment()),
    )
    calls: list[str] = []
    monkeypatch.setattr(Linear, "forward", lambda *_: calls.append("branch"))
    monkeypatch.setattr(PackedLinear, "forward", lambda *_: calls.append("packed"))
    assert math.isfinite(evaluate(model, CPU)["loss"])
    assert not calls


def test_a_layer_of_bitsandbytes_keeps_its_branch(folders: dict[str, Path]) -> None:
    model = adapted(folders[BERT], "bitsandbytes 4")
    expected = logits(model, BERT)
    with merged(model):
        assert any(isinstance(module, LoraLayer) for module in model.modules())
        assert torch.equal(logits(model, BERT), expected)


def test_a_failed_evaluation_gives_the_layers_back(folders: dict[str, Path]) -> None:
    model = adapted(folders[BERT])
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="fails"), merged(model):
        raise RuntimeError("it fails")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("base", list(BASES))
def test_an_evaluation_changes_no_bit_of_the_training_after_it(
    folders: dict[str, Path], base: str, bf16: bool
) -> None:
    states = []
    for evaluates in (False, True):
        model = adapted(folders[BERT], base)
        run = training(store_in_bf16(model) if bf16 else model, BERT)
        run.advance(2)
        if evaluates:
            classification_evaluator(examples(BERT), 0, Experiment())(model, CPU)
        run.advance(2)
        states.append(read_state(model))
    assert same(*states)


# What is not computed


def test_nothing_frozen_has_a_gradient_and_backward_stops_at_the_lowest_adapted_layer(
    folders: dict[str, Path],
) -> None:
    model = adapted(folders[BERT], targets=("layer.1.attention.self.value",))
    reached: dict[int, bool] = {}
    layers = model.get_submodule("base_model.model.bert.encoder.layer")
    for number, layer in enumerate(layers.children()):
        layer.register_forward_hook(
            lambda _layer, _inputs, output, n=number: reached.update({n: output.requires_grad})
        )
    training(model, BERT).advance(1)
    assert reached == {0: False, 1: True}
    own = {id(parameter) for parameter in trainable(model).values()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in own)


def test_a_part_that_is_not_trained_in_a_round_has_no_gradient(folders: dict[str, Path]) -> None:
    model = adapted(folders[BERT])
    with ModelState(model).training_only(frozenset({"B", "head"})):
        training(model, BERT).advance(1)
    for name, parameter in trainable(model).items():
        assert (parameter.grad is None) == (part(name) == "A")


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_without_a_label_are_left_out_and_the_loss_is_transformers(
    folders: dict[str, Path], family: str
) -> None:
    model, batch = adapted(folders[family]).eval(), collate(examples(family), 0)
    theirs = model(**batch)
    found, labels = predictions(model, batch, CPU)
    loss = smoothed_loss(found, labels, 0.0)
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    if family != BERT:  # the first three tokens are a prompt: their two first logits meet no label
        assert found.shape[:2] == labels.shape == (12, batch["labels"].shape[1] - 3)
        torch.testing.assert_close(found, theirs.logits[:, 2:-1], rtol=1e-5, atol=1e-6)


def test_the_language_head_computes_no_column_without_a_label(folders: dict[str, Path]) -> None:
    model, rows = adapted(folders["llama"]), list[int]()
    model.get_submodule("base_model.model.lm_head").register_forward_hook(
        lambda _layer, inputs, _output: rows.append(inputs[0].shape[1])
    )
    batch = collate(examples("llama"), 0)
    predictions(model, batch, CPU)
    assert rows == [batch["labels"].shape[1] - 3]


# Batches by length


def orders(lengths: list[int], size: int, epochs: int, *, by_length: bool) -> Iterator[list[int]]:
    random = generator(0, "order")
    encoded: Encoded = [(torch.zeros(n, dtype=torch.int64), 0) for n in lengths]
    for _ in range(epochs):
        yield epoch_order(encoded, size, random, by_length=by_length)


def padding(lengths: list[int], order: list[int], size: int) -> int:
    batches = [[lengths[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


@pytest.mark.parametrize(("count", "size"), [(1, 4), (7, 8), (64, 8), (1003, 8)])
def test_batches_by_length_hold_every_example_once_and_less_padding(count: int, size: int) -> None:
    lengths = torch.randint(3, 60, (count,), generator=generator(1, "lengths")).tolist()
    found = list(orders(lengths, size, 3, by_length=True))
    assert all(sorted(order) == list(range(count)) for order in found)
    assert found == list(orders(lengths, size, 3, by_length=True))
    if count > size:
        assert found[0] != found[1]
        plain = list(orders(lengths, size, 3, by_length=False))
        for ours, chance in zip(found, plain, strict=True):
            assert padding(lengths, ours, size) < 0.8 * padding(lengths, chance, size)


def test_training_by_length_goes_on_where_it_was_saved(folders: dict[str, Path]) -> None:
    whole = adapted(folders[BERT])
    training(whole, BERT, group_by_length=True).advance(4)
    first = adapted(folders[BERT])
    run = training(first, BERT, group_by_length=True)
    run.advance(1)
    again = training(first, BERT, group_by_length=True)
    again.load(run.save())
    again.advance(3)
    assert same(read_state(first), read_state(whole))
    other = adapted(folders[BERT])
    training(other, BERT).advance(4)
    assert not same(read_state(other), read_state(whole))


# bf16


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_trains_fp32_parameters_close_to_fp32_and_the_same_twice(
    folders: dict[str, Path], family: str, base: str
) -> None:
    """bf16 has 8 bits of mantissa; the loss of four steps is within 2 % of that in fp32."""
    losses, states = [], []
    for bf16 in (False, True, True):
        model = adapted(folders[family], base)
        start = read_state(model)
        if bf16:
            assert same(read_state(store_in_bf16(model)), start)
            stored = {p.dtype for p in model.parameters() if not p.requires_grad}
            assert torch.float32 not in stored
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        run = training(model, family)
        losses.append(run.advance(4))
        assert {p.grad.dtype for p in trainable(model).values() if p.grad is not None} == {
            torch.float32
        }
        moments = run._optimizer.state.values()
        assert {moment["exp_avg"].dtype for moment in moments} == {torch.float32}
        states.append(read_state(model))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert losses[2] == losses[1]
    assert same(states[1], states[2])


def test_processes_share_one_copy_in_bf16_of_a_shared_base(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path))
    files = []
    for bits, seed in ((32, 0), (32, 1), (4, 0)):
        base = Base(ModelConfig(name=str(folders[BERT])), 3, pad=0, seed=seed)
        config = ClientConfig(base_bits=bits)
        model = add_lora(share_base(base, config), LoraConfig(rank=2), seed)
        rounded = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
        store_in_bf16(model)
        ranges, mapped = cache.mapped_ranges(), 0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(parameter, rounded[name])
                mapped += any(first <= parameter.data_ptr() < last for first, last in ranges)
        assert mapped > 5
        files.append(len(list(tmp_path.glob("halves/*.safetensors"))))
    assert files == [1, 1, 2]  # what a seed draws, the head, is not in it
    store_in_bf16(copy.deepcopy(adapted(folders[BERT])))  # of this process alone
    assert len(list(tmp_path.glob("halves/*.safetensors"))) == 2


def test_a_rotary_embedding_and_packed_scales_stay_fp32(folders: dict[str, Path]) -> None:
    model = store_in_bf16(adapted(folders["llama"], "packed"))
    stored = {n: b.dtype for n, b in model.named_buffers() if b.is_floating_point()}
    assert any("inv_freq" in name for name in stored)
    assert any("scale" in name or "absmax" in name for name in stored)
    assert set(stored.values()) == {torch.float32}


def test_a_processor_without_bf16_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    device._warn_of_emulation.cache_clear()
    for _ in range(3):
        with device.computing(torch.bfloat16, CPU):
            assert torch.is_autocast_enabled("cpu")
    with device.computing(torch.float32, CPU):
        assert not torch.is_autocast_enabled("cpu")
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "client.compute 'bf16': this processor has no instructions" in record.getMessage()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert device.has_bf16("cpu")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert device.has_bf16("cpu")
