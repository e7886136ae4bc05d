"""Losses by target, and inputs by token, against plain loops on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedlpp_ray.config import LoraConfig, ModelConfig
from fedlpp_ray.lora import add_lora, trainable
from fedlpp_ray.models import load_classifier, load_generator
from fedlpp_ray.privacy import PrivacyError
from fedlpp_ray.tasks import IGNORED, Encoded
from fedlpp_ray.training import first_inputs, target_losses
from tests import tiny

CPU = torch.device("cpu")


def adapted(base: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    model = add_lora(base, LoraConfig(rank=4, alpha=8, targets=targets), 0)
    torch.manual_seed(1)
    for name, parameter in trainable(model).items():
        if name.endswith("lora_B.weight"):
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tiny.make_generator(tmp_path_factory.mktemp("llama"))
    return adapted(load_generator(ModelConfig(name=str(folder)), pad=0), ("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def bert(tiny_model: Path) -> nn.Module:
    base = load_classifier(ModelConfig(name=str(tiny_model)), 3, pad=0, seed=0)
    return adapted(base, ("query", "value"))


def texts(count: int, *, written: bool) -> Encoded:
    random = torch.Generator().manual_seed(0)
    made: list[tuple[Tensor, Any]] = []
    for i in range(count):
        ids = torch.randint(4, 25, (3 + 5 * i % 11,), generator=random)
        labels = ids.clone()
        labels[: 1 + i % 2] = IGNORED
        made.append((ids, labels if written else i % 3))
    return made


def alone(model: Any, example: tuple[Tensor, Any]) -> np.ndarray:
    ids, label = example
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[None]).logits[0]
    if isinstance(label, int):
        return cross_entropy(logits[None], torch.tensor([label]), reduction="none").numpy()
    known = label[1:] != IGNORED
    return cross_entropy(logits[:-1][known], label[1:][known], reduction="none").numpy()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_losses_are_those_of_each_text_alone_in_every_batch_size(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    examples = texts(13, written=kind == "llama")
    expected = [alone(model, example) for example in examples]
    model.train()
    for size in (1, 4, 64):
        found = target_losses(model, examples, 0, CPU, size)
        again = target_losses(model, examples, 0, CPU, size)
        assert [len(x) for x in found] == [len(x) for x in expected]
        for one, same, other in zip(found, again, expected, strict=True):
            np.testing.assert_array_equal(one, same)
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert not model.training


def test_a_part_of_the_texts_in_another_order_has_the_same_losses(llama: nn.Module) -> None:
    examples = texts(9, written=True)
    whole = target_losses(llama, examples, 0, CPU, 3)
    order = [7, 0, 4]
    part = target_losses(llama, [examples[i] for i in order], 0, CPU, 3)
    for i, found in zip(order, part, strict=True):
        np.testing.assert_allclose(found, whole[i], rtol=0, atol=1e-5)


def test_inputs_of_bert_are_its_embeddings_by_token_and_position(bert: Any) -> None:
    found = first_inputs(bert, torch.arange(25), 6, CPU)
    ids = torch.tensor([[7, 3, 3, 19, 0, 24]])
    with torch.no_grad():
        expected = bert.base_model.model.bert.embeddings(input_ids=ids)[0]
    torch.testing.assert_close(found.inputs[ids[0], range(6)], expected)
    assert found.inputs.shape == (25, 6, 64)
    prefix = "base_model.model.bert.encoder.layer.0.attention.self."
    assert found.layers == (f"{prefix}query", f"{prefix}value")


def test_inputs_of_llama_do_not_depend_on_the_position(llama: Any) -> None:
    found = first_inputs(llama, torch.arange(25), 6, CPU)
    own = llama.base_model.model.model
    with torch.no_grad():
        expected = own.layers[0].input_layernorm(own.embed_tokens(torch.arange(25)))
    torch.testing.assert_close(found.inputs, expected[:, None])
    assert [name.rpartition(".")[2] for name in found.layers] == ["q_proj", "v_proj"]


def test_the_first_inputs_leave_no_hook_behind(llama: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = llama.eval()(input_ids=ids).logits
        first_inputs(llama, torch.arange(9), 3, CPU)
        assert torch.equal(llama(input_ids=ids).logits, before)


def test_a_first_adapted_layer_behind_attention_is_refused(tmp_path: Path) -> None:
    folder = tiny.make_generator(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(folder)
    for targets in (("o_proj",), ("up_proj",)):
        model = adapted(base, targets)
        with pytest.raises(PrivacyError, match=r"lora.targets: .* reads more than one token"):
            first_inputs(model, torch.arange(9), 4, CPU)
        base = AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_without_lora_is_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_generator(tmp_path / "model"))
    with pytest.raises(PrivacyError, match="allowed: 'lora'"):
        first_inputs(base.requires_grad_(False), torch.arange(9), 4, CPU)
