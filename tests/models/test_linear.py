"""Frozen layers by oneDNN: fp32 as accurate as `nn.Linear`, the same bits twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlpp_ray.config import ClientConfig, LoraConfig, ModelConfig
from fedlpp_ray.lora import add_lora, merged
from fedlpp_ray.models import Base, FrozenLinear, PackedLinear, linear, load_classifier, share_base
from fedlpp_ray.quantization import Quantizer
from tests import tiny

BOUND = 1e-6
"""Of a result's norm. fp32 rounds to 6e-8, bf16 to 4e-3."""

has_kernel = pytest.mark.skipif(not linear.has_onednn(), reason="this torch has no oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=has_kernel), False], ids=["oneDNN", "torch"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever this processor prefers, both are tested."""
    monkeypatch.setattr(linear, "prefers_onednn", lambda: request.param)


def layer(bias: bool = True, kind: type[nn.Linear] = FrozenLinear) -> nn.Linear:
    torch.manual_seed(0)
    return kind(129, 66, bias=bias).requires_grad_(False)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def run(one: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of the sum of its squares' halves."""
    y = one(x)
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    return y.detach(), gradient


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 129), (3, 7, 129), (1500, 129), (2, 129), (129,), (0, 129)])
@pytest.mark.usefixtures("chosen")
def test_results_and_gradients_are_those_of_fp64_within_fp32(
    shape: tuple[int, ...], bias: bool
) -> None:
    x, one = inputs(*shape), layer(bias)
    found = run(one, x)
    exact = run(layer(bias, nn.Linear).double(), x.detach().double().requires_grad_())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert x.numel() == 0 or error(ours, theirs) < BOUND


@pytest.mark.usefixtures("chosen")
def test_a_transposed_input_gradient_and_weight_are_read_as_they_are() -> None:
    """GPT-2's weight is W^T of what is stored; a mapped tensor may begin anywhere in its file."""
    one, x = layer(), inputs(129, 40).t()
    weight = one.weight.detach()
    stored = torch.empty(weight.numel() + 1)[1:].view(129, 66)
    one.weight = nn.Parameter(stored.copy_(weight.t()).t(), requires_grad=False)
    y = one(x)
    gradient = torch.randn(66, 40).t()
    (found,) = torch.autograd.grad(y, x, gradient)
    assert error(y, x.double() @ weight.double().t() + one.bias.double()) < BOUND
    assert error(found, gradient.double() @ weight.double()) < BOUND


@pytest.mark.usefixtures("chosen")
def test_the_same_bits_twice_and_in_another_thread() -> None:
    one, x, found = layer(), inputs(40, 129), list[tuple[Tensor, Tensor]]()
    threads = torch.get_num_threads()

    def compute() -> None:
        torch.set_num_threads(threads)
        found.append(run(one, x))

    compute()
    for _ in range(2):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@has_kernel
def test_the_kernel_is_used_only_for_frozen_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    one, x, calls = layer(), inputs(40, 129), list[Tensor]()
    real = linear.product
    monkeypatch.setattr(linear, "product", lambda *a: calls.append(a[0]) or real(*a))
    run(one, x)
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert one(x).dtype == torch.bfloat16
    assert layer().bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    one.requires_grad_(True)(x).sum().backward()
    assert one.weight.grad is not None
    assert one.bias.grad is not None
    one.weight.requires_grad_(False)
    one(x).sum().backward()
    assert layer().to("meta")(x.to("meta")).is_meta
    assert len(calls) == 2


@pytest.mark.usefixtures("chosen")
def test_a_packed_layer_computes_the_same_as_its_dense_one() -> None:
    one, x = layer(), inputs(40, 129)
    packed = PackedLinear(one, Quantizer(4))
    one.weight = nn.Parameter(packed.packed.dequantize(torch.float32), requires_grad=False)
    for ours, theirs in zip(run(packed, x), run(one, x), strict=True):
        assert torch.equal(ours, theirs)


def test_what_the_processor_prefers_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str, **found: bool) -> bool:
        told = {"cpu_name": name, **found}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
        linear.prefers_onednn.cache_clear()
        return linear.prefers_onednn()

    try:
        assert ask("AMD EPYC 9965", avx512_f=True) == linear.has_onednn()
        assert not ask("AMD EPYC 7551", avx512_f=False)
        assert not ask("Intel(R) Xeon(R)", avx512_f=True)
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        linear.prefers_onednn.cache_clear()
        assert not linear.prefers_onednn()
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not ask("AMD EPYC 9965", avx512_f=True)
    finally:
        linear.prefers_onednn.cache_clear()


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.usefixtures("chosen")
def test_shared_bases_have_such_layers_and_peft_and_merging_know_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path / "cache"))
    model = ModelConfig(name=str(tiny.make_model(tmp_path / "model")))
    config = ClientConfig(base_bits=bits, dequantize_at_load=True)
    loaded = share_base(Base(model, 3, pad=0, seed=0), config)
    mapped = share_base(Base(model, 3, pad=0, seed=0), config)
    for one in (loaded, mapped):
        assert not [n for n, m in one.named_modules() if type(m) is nn.Linear]
        adapted = add_lora(one, LoraConfig(rank=2), seed=0)
        assert any(isinstance(m, LoraLayer) for m in adapted.modules())
        ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
        expected = adapted(input_ids=ids).logits
        expected.sum().backward()
        with merged(adapted), torch.no_grad():
            assert not any(isinstance(m, LoraLayer) for m in adapted.modules())
            assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-5)
    frozen = [p for p in loaded.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@has_kernel
def test_few_numbers_of_rows_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps code, hence memory, for each."""
    seen, real = set(), torch.ops.mkldnn._linear_pointwise

    def kernel(x: Tensor, *rest: object) -> Tensor:
        seen.add(len(x))
        return real(x, *rest)

    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", kernel)
    weight = torch.randn(3, 2)
    for rows in range(linear.LEAST_ROWS, 3000):
        x = torch.ones(rows, 2)
        assert torch.allclose(linear.product(x, weight), x @ weight.t(), atol=1e-5)
    assert seen == {*range(8, 129, 8), 256, 512, 1024}


@has_kernel
def test_a_model_computes_the_same_with_either_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_classifier(ModelConfig(name=str(tiny.make_model(tmp_path))), 3, pad=0, seed=0)
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for prefers in (True, False):
        monkeypatch.setattr(linear, "prefers_onednn", lambda prefers=prefers: prefers)
        found.append(model(input_ids=ids).logits)
    assert error(found[0], found[1].double()) < BOUND
