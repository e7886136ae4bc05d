"""The client's base: packed, dense-dequantized, and bitsandbytes with its traps closed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedlpp_ray.config import ClientConfig, LoraConfig, ModelConfig
from fedlpp_ray.lora import add_lora
from fedlpp_ray.models import (
    BaseFormatError,
    PackedLinear,
    load_classifier,
    quantize_base,
)
from fedlpp_ray.quantization import Quantizer
from tests import tiny


def classifier(folder: Path) -> nn.Module:
    return load_classifier(ModelConfig(name=str(folder)), 3, pad=0, seed=0)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 25, (6, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.eval()  # dropout off; autograd on
    model(**batch()).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def nonzero_adapter(model: nn.Module) -> nn.Module:
    """B starts at zero, and then A has no gradient: give B values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_equals_the_dense_layer_with_its_dequantized_weight(
    bits: int, bias: bool
) -> None:
    torch.manual_seed(bits)
    linear = nn.Linear(50, 33, bias=bias)  # a width that no block divides
    quantizer = Quantizer(bits)
    packed = PackedLinear(linear, quantizer)
    dense = nn.Linear(50, 33, bias=bias)
    dense.load_state_dict(linear.state_dict())
    dense.weight.data = quantizer.quantize(linear.weight).dequantize()
    x = torch.randn(4, 7, 50)
    x_packed, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_packed, y_dense = packed(x_packed), dense(x_dense)
    y_packed.square().sum().backward()
    y_dense.square().sum().backward()
    assert torch.equal(y_packed, y_dense)
    assert torch.equal(x_packed.grad, x_dense.grad)


def test_a_packed_linear_stores_k_bits_a_weight_and_follows_its_module() -> None:
    linear = nn.Linear(256, 128)
    packed = PackedLinear(linear, Quantizer(3, block=64))
    stored = sum(buffer.nbytes for buffer in packed.buffers())
    assert stored == 256 * 128 * 3 // 8 + 256 * 128 // 64 * 4
    assert not any(p.numel() == linear.weight.numel() for p in packed.parameters())
    copy = PackedLinear(nn.Linear(256, 128), Quantizer(3, block=64))
    copy.load_state_dict(packed.state_dict())
    x = torch.randn(2, 256)
    assert torch.equal(copy(x), packed(x))


def test_a_packed_linear_computes_in_the_dtype_of_its_input() -> None:
    packed = PackedLinear(nn.Linear(64, 8), Quantizer(4))
    assert packed(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_peft_wraps_packed_layers_without_registration(tiny_model: Path) -> None:
    base = quantize_base(classifier(tiny_model), ClientConfig(base_bits=4))
    model = add_lora(base, LoraConfig(rank=2), seed=0)
    wrapped = [
        m for m in model.modules() if isinstance(getattr(m, "base_layer", None), PackedLinear)
    ]
    assert len(wrapped) == 4  # query and value of two layers
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "classifier" in n for n in trainable)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantizing_at_load_gives_the_same_numbers(tiny_model: Path, bits: int) -> None:
    models = [
        nonzero_adapter(
            add_lora(
                quantize_base(
                    classifier(tiny_model), ClientConfig(base_bits=bits, dequantize_at_load=dense)
                ),
                LoraConfig(rank=2),
                seed=0,
            )
        )
        for dense in (False, True)
    ]
    packed, dense = (gradients(model) for model in models)
    assert all(torch.equal(packed[name], dense[name]) for name in dense)
    assert torch.equal(models[0](**batch()).logits, models[1](**batch()).logits)


def test_embeddings_norms_and_the_head_keep_full_precision(tiny_model: Path) -> None:
    before = classifier(tiny_model).state_dict()
    after = quantize_base(classifier(tiny_model), ClientConfig(base_bits=2)).state_dict()
    kept = [name for name in after if not name.rpartition(".")[2].startswith("packed_")]
    assert any("embeddings" in name for name in kept)
    assert any(name.startswith("classifier") for name in kept)
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert "bert.encoder.layer.0.output.dense.weight" not in kept


def test_fewer_bits_are_further_from_the_original(tiny_model: Path) -> None:
    full = classifier(tiny_model)(**batch()).logits
    errors = [
        (quantize_base(classifier(tiny_model), ClientConfig(base_bits=b))(**batch()).logits - full)
        .norm()
        .item()
        for b in (8, 4, 2)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


# bitsandbytes


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_bases_train_the_same_after_an_evaluation(tiny_model: Path, bits: int) -> None:
    """On AVX512-BF16, evaluation repacked the weights and later gradients were wrong or None."""
    pytest.importorskip("bitsandbytes")
    config = ClientConfig(base_bits=bits, base_format="bitsandbytes")
    model = nonzero_adapter(
        add_lora(quantize_base(classifier(tiny_model), config), LoraConfig(rank=2), seed=0)
    )
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(**{k: v for k, v in batch().items() if k != "labels"})
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(grad.norm() > 0 for grad in before.values())


def test_nf4_through_bitsandbytes_is_our_nf4(tiny_model: Path) -> None:
    """The same codes; only the order of products in the matrix multiplication may differ."""
    pytest.importorskip("bitsandbytes")
    ours = quantize_base(classifier(tiny_model), ClientConfig(base_bits=4))
    theirs = quantize_base(
        classifier(tiny_model), ClientConfig(base_bits=4, base_format="bitsandbytes")
    )
    torch.testing.assert_close(
        ours(**batch()).logits, theirs(**batch()).logits, atol=1e-5, rtol=1e-5
    )


def test_int8_is_close_to_full_precision(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    full = classifier(tiny_model)
    int8 = quantize_base(
        classifier(tiny_model), ClientConfig(base_bits=8, base_format="bitsandbytes")
    )
    torch.testing.assert_close(int8(**batch()).logits, full(**batch()).logits, atol=0.05, rtol=0.05)
    assert not torch.equal(int8(**batch()).logits, full(**batch()).logits)


def test_widths_that_bitsandbytes_gets_wrong_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    odd = tiny.make_model(tmp_path / "odd", hidden=96)
    config = ClientConfig(base_bits=4, base_format="bitsandbytes")
    with pytest.raises(BaseFormatError, match=r"attention.self.query \(96\).*'packed'"):
        quantize_base(classifier(odd), config)
    quantize_base(classifier(odd), ClientConfig(base_bits=4))  # packed takes any width


def test_a_missing_bitsandbytes_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = ClientConfig(base_bits=8, base_format="bitsandbytes")
    with pytest.raises(BaseFormatError, match="pip install 'fedlpp_ray"):
        quantize_base(classifier(tiny_model), config)
