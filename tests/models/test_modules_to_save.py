"""Modules that are trained whole beside the adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from fedlpp_ray.config import ClientConfig, ConfigError, Experiment, LoraConfig, ModelConfig
from fedlpp_ray.lora import LoraError, add_lora, read_state, trainable, write_state
from fedlpp_ray.models import (
    PackedLinear,
    check_base,
    load_classifier,
    load_generator,
    load_outline,
    quantize_base,
)
from fedlpp_ray.state import is_head, state_digest
from tests import tiny

PREFIX = "base_model.model."


def config_of(folder: Path, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(name=str(tiny.make_generator(folder, tied=tied)))


def heads(model: nn.Module) -> list[str]:
    return [name.removeprefix(PREFIX) for name in read_state(model) if is_head(name)]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("norm",), ["model.norm.weight"]),  # not input_layernorm
        (("model.norm", "lm_head"), ["lm_head.weight", "model.norm.weight"]),
        (
            ("down_proj",),
            ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"],
        ),
        (
            ("0.mlp", "0.mlp.up_proj"),  # once, although it is named twice
            [f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up")],
        ),
        (("embed_tokens",), ["model.embed_tokens.weight"]),
    ],
)
@pytest.mark.parametrize("client", [ClientConfig(), ClientConfig(base_bits=3)], ids=["32", "3"])
def test_they_are_trained_sent_and_kept_in_full_precision(
    names: tuple[str, ...], found: list[str], client: ClientConfig, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    lora = LoraConfig(rank=2, modules_to_save=names)
    original = load_generator(config, 0).state_dict()
    base = quantize_base(load_generator(config, 0), client, names)
    assert any(isinstance(m, PackedLinear) for m in base.modules()) == (client.base_bits == 3)
    model = add_lora(base, lora, seed=0).eval()
    assert heads(model) == found
    state = read_state(model)
    assert all(torch.equal(state[PREFIX + name], original[name]) for name in found)
    assert state.keys() == trainable(add_lora(load_outline(config, None), lora, 0)).keys()

    ids = torch.randint(4, 36, (3, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    assert all(trainable(model)[PREFIX + name].grad.norm() > 0 for name in found)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = read_state(model)
    assert all(not torch.equal(changed[PREFIX + name], original[name]) for name in found)
    write_state(model, state)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
    assert state_digest(read_state(model)) == state_digest(state)


@pytest.mark.parametrize(
    "names", [(), ("norm",), ("model.norm", "lm_head"), ("embed_tokens",), ("0.mlp",)]
)
def test_pefts_adapter_files_hold_the_state_and_load(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "model")
    model = add_lora(load_generator(config, 0), LoraConfig(rank=2, modules_to_save=names), 0)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(t.shape, generator=generator) for n, t in read_state(model).items()}
    write_state(model, state)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert state_digest(saved) == state_digest(state)
    loaded = PeftModel.from_pretrained(load_generator(config, 0), tmp_path / "adapter").eval()
    ids = torch.arange(4, 13).view(1, 9)
    # What was trained here is frozen there: by another kernel, perhaps (models/linear.py).
    ours = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_a_classifiers_head_is_trained_beside_them_and_once(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model))
    for names in (("pooler",), ("pooler", "classifier")):
        model = load_classifier(config, 3, pad=0, seed=0)
        base = quantize_base(model, ClientConfig(base_bits=4), names)
        adapted = add_lora(base, LoraConfig(rank=2, modules_to_save=names), 0)
        dense = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
        assert heads(adapted) == [*dense, "classifier.bias", "classifier.weight"]


def test_bitsandbytes_need_not_store_what_is_trained_whole(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    outline = load_outline(ModelConfig(name=str(tiny.make_model(tmp_path, hidden=96))), 3)
    client = ClientConfig(base_bits=4, base_format="bitsandbytes")
    names = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "pooler")
    check_base(outline, client, names)  # 192 inputs are left


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"modules_to_save": ("nothing",)},
            r"'nothing' matches no module.*q_proj.*layernorm, norm$",
        ),
        ({"modules_to_save": ("act_fn",)}, "'act_fn' matches no module with parameters"),
        ({"modules_to_save": ("layers",)}, "'layers' is a list of modules"),
        ({"modules_to_save": ("v_proj",)}, r"v_proj' matches lora\.targets too"),
        ({"modules_to_save": ("1.self_attn",)}, r"layers\.1\.self_attn\.q_proj' matches lora\.t"),
        ({"modules_to_save": ("lm_head",)}, "'lm_head.weight' is tied to 'model.embed_tokens.weig"),
        ({"modules_to_save": ("embed_tokens",)}, "tokens.weight' is tied to 'lm_head.weight'"),
        ({"targets": ("embed_tokens",)}, r"targets = \['embed_tokens'\].*embed_tokens' is no lin"),
    ],
)
def test_what_cannot_be_trained_whole_or_adapted_is_refused(
    values: dict[str, tuple[str, ...]], words: str, tmp_path: Path
) -> None:
    outline = load_outline(config_of(tmp_path, tied=True), None)
    with pytest.raises(LoraError, match=words):
        add_lora(outline, LoraConfig(rank=2, **values), 0)


def test_a_name_is_not_empty() -> None:
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save"):
        Experiment().with_values({"lora.modules_to_save": [""]})
