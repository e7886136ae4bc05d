"""The head of a causal model keeps full precision, tied to the embeddings or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedlpp_ray.config import ClientConfig
from fedlpp_ray.models import head_modules, quantize_base

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=64, n_layer=1, n_head=2))


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))


@pytest.mark.parametrize(("make", "tied"), [(gpt2, True), (qwen2, True), (llama, False)])
@pytest.mark.parametrize(
    "client",
    [
        ClientConfig(base_bits=2),
        ClientConfig(base_bits=2, dequantize_at_load=True),
        ClientConfig(base_bits=4, base_format="bitsandbytes"),
    ],
    ids=["packed", "dequantized at load", "bitsandbytes"],
)
def test_the_head_and_the_embeddings_are_untouched(
    make: Callable[[], nn.Module], tied: bool, client: ClientConfig
) -> None:
    if client.base_format == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = make().requires_grad_(False).eval()
    head, embeddings = model.lm_head, model.get_input_embeddings()
    before = [layer.weight.clone() for layer in (head, embeddings)]
    ids = torch.arange(1, 9).view(1, 8)
    full = model(input_ids=ids).logits
    quantize_base(model, client)
    assert head_modules(model) == ["lm_head"]
    assert model.lm_head is head
    assert model.get_input_embeddings() is embeddings
    assert (head.weight is embeddings.weight) == tied
    assert all(map(torch.equal, (head.weight, embeddings.weight), before))
    output = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(output.logits, functional.linear(output.hidden_states[-1], before[0]))
    assert (output.logits - full).abs().max() > 1e-3  # the layers below are quantized
