"""The quantizer's manners: shapes, scales, stochastic rounding, refusals, memory, threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedlpp_ray.quantization import Bits, Kind, QuantizedTensor, Quantizer, Scale, codebook, unpack
from fedlpp_ray.quantization.rounding import Levels

KINDS: list[Kind] = ["nf", "nf-symmetric", "lloyd-max", "int"]
BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]
SCALES: list[Scale] = ["fp32", "fp16", "double"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(quantized: QuantizedTensor) -> Tensor:
    q = quantized.quantizer
    levels = codebook(q.bits, q.kind, q.block).numel()
    return unpack(quantized.parts["codes"], levels, quantized.numel)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return all(torch.equal(part, b.parts[name]) for name, part in a.parts.items())


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", ["ternary", 3, 4, 8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (63,), (65,), (5, 7, 11), (64, 64)])
def test_any_shape(shape: tuple[int, ...], bits: Bits, scale: Scale) -> None:
    quantizer = Quantizer(bits, scale=scale)
    weights = gaussian(*shape)
    quantized = quantizer.quantize(weights)
    values = quantized.dequantize()
    assert values.shape == weights.shape
    assert quantized.shape == tuple(shape)
    specs = {name: (part.dtype, tuple(part.shape)) for name, part in quantized.tensors().items()}
    assert specs == quantizer.parts(shape)
    assert quantized.nbytes == sum(part.nbytes for part in quantized.tensors().values())
    if weights.numel():
        limit = weights.abs().max() * codebook(bits).diff().max() * 0.51
        assert (values - weights).abs().max() <= limit


def test_non_contiguous_tensors_are_read_row_major() -> None:
    weights = gaussian(96, 130)
    for view in (weights.t(), weights[::2, 3:100], weights[:, None].expand(96, 3, 130)):
        quantizer = Quantizer(4)
        assert same(quantizer.quantize(view), quantizer.quantize(view.clone().contiguous()))


def test_odd_blocks_and_odd_lengths() -> None:
    """Runs that start at odd offsets take another look-up than even ones, with the same result."""
    weights = gaussian(400_001)
    quantizer = Quantizer(4, block=9)
    quantized = quantizer.quantize(weights)
    levels, scale = codebook(4), quantized.parts["scales"].repeat_interleave(9)[:400_001]
    assert torch.equal(quantized.dequantize(), levels[codes_of(quantized).long()] * scale)


def test_large_results_hold_the_same_values() -> None:
    """Beyond 32 MiB the result lies in huge pages."""
    weights = gaussian(2**23 + 5)
    values = Quantizer(4).quantize(weights).dequantize()
    part = Quantizer(4).quantize(weights[: 2**20]).dequantize()
    tail = Quantizer(4).quantize(weights[2**23 :]).dequantize()
    assert torch.equal(values[: 2**20], part)
    assert torch.equal(values[2**23 :], tail)
    values.requires_grad_().sum().backward()
    assert values.grad is not None


def test_exact_sizes() -> None:
    weights = gaussian(6400)
    for bits, size in [("ternary", 1280), (2, 1600), (3, 2400), (4, 3200), (5, 4000), (8, 6400)]:
        assert Quantizer(bits).quantize(weights).nbytes == size + 100 * 4
    assert Quantizer(4, scale="fp16").quantize(weights).nbytes == 3200 + 100 * 2
    assert Quantizer(4, scale="double").quantize(weights).nbytes == 3200 + 100 + 8


def test_input_is_untouched_and_not_aliased() -> None:
    weights = gaussian(1000).requires_grad_()
    before = weights.detach().clone()
    for scale in SCALES:
        for rounding in ("nearest", "stochastic"):
            quantizer = Quantizer(8, block=8, scale=scale, rounding=rounding)  # type: ignore[arg-type]
            quantizer.quantize(weights, seeded()).dequantize().zero_()
    assert torch.equal(weights, before)
    assert weights.grad is None


# --- special values -----------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", ["ternary", 2, 8])
def test_all_zero_blocks(bits: Bits, kind: Kind, scale: Scale, rounding: Any) -> None:
    weights = gaussian(10 * 64)
    weights[64:128] = 0
    weights[-64:] = 0
    quantized = Quantizer(bits, kind, scale=scale, rounding=rounding).quantize(weights, seeded())
    zero = codebook(bits, kind).abs().argmin()
    for block in (slice(64, 128), slice(-64, None)):
        assert (codes_of(quantized)[block] == zero).all()
        assert (quantized.dequantize()[block] == 0).all()
    assert (quantized.parts["scales"] == 0).sum() == 2
    assert quantized.dequantize().isfinite().all()


@pytest.mark.parametrize("scale", ["fp32", "double"])
@pytest.mark.parametrize("exponent", [-149, -140, -128, -127, -126, -100, 100, 125])
def test_extreme_scales_give_the_same_codes(exponent: int, scale: Scale) -> None:
    """Small integers times a power of two: the codes may not depend on the power."""
    integers = torch.randint(-7, 8, (640,), generator=seeded()).float()
    integers[::64] = 7
    weights = integers.double().mul(2.0**exponent).float()
    assert torch.equal(weights.double() * 2.0**-exponent, integers.double())
    for kind in KINDS:
        quantizer = Quantizer(4, kind, scale=scale)
        expected = codes_of(quantizer.quantize(integers))
        assert torch.equal(codes_of(quantizer.quantize(weights)), expected)
        assert quantizer.quantize(weights).dequantize().isfinite().all()


def test_subnormal_block_leaves_the_others_alone() -> None:
    weights = gaussian(640)
    expected = codes_of(Quantizer(4).quantize(weights))
    weights[64:128] = 1e-40
    codes = codes_of(Quantizer(4).quantize(weights))
    assert torch.equal(codes[128:], expected[128:])
    assert (codes[64:128] == 15).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    weights = gaussian(300).to(dtype)
    weights[299] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        Quantizer(4).quantize(weights)


def test_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond float32"):
        Quantizer(4).quantize(torch.tensor([1e39], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="floating-point"):
        Quantizer(4).quantize(torch.zeros(64, dtype=dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "'ternary'"),
        ({"bits": 4, "kind": "fp4"}, "kind must be one of"),
        ({"bits": 4, "block": 4}, "from 8 to 65536"),
        ({"bits": 4, "scale": "bf16"}, "scale must be one of fp32, fp16, double, got 'bf16'"),
        ({"bits": 4, "rounding": "up"}, "rounding must be one of nearest, stochastic"),
    ],
)
def test_unknown_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer(**arguments)


# --- scales -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["fp16", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_nearest_for_the_stored_scale(kind: Kind, scale: Scale) -> None:
    weights = gaussian(300 * 64) * torch.logspace(-3, 1, 300).repeat_interleave(64)
    quantized = Quantizer(4, kind, scale=scale).quantize(weights)
    values = quantized.dequantize()
    levels = codebook(4, kind)
    c = (values / levels[codes_of(quantized).long()]).view(300, 64).nanmedian(1).values[:, None]
    best = (weights.view(300, 64, 1) - c[..., None] * levels).abs().amin(-1).view(-1)
    assert ((values - weights).abs() <= best + 1e-5 * c.expand(300, 64).reshape(-1)).all()


def test_fp16_scales() -> None:
    weights = gaussian(6400)
    quantized = Quantizer(4, scale="fp16").quantize(weights)
    expected = weights.view(100, 64).abs().amax(1).half()
    assert torch.equal(quantized.parts["scales"], expected)
    with pytest.raises(ValueError, match=r"exceeds torch\.float16: use scale='fp32'"):
        Quantizer(4, scale="fp16").quantize(torch.full((8,), 65520.0))
    tiny = Quantizer("ternary", scale="fp16").quantize(torch.full((8,), 1e-9))
    assert tiny.parts["scales"].item() == 2.0**-24


def test_double_scales() -> None:
    """300 blocks: two groups; relative to the group's range a scale is off by at most 1/508."""
    weights = gaussian(300 * 64)
    c = weights.view(300, 64).abs().amax(1)
    quantized = Quantizer("ternary", scale="double").quantize(weights)
    assert quantized.parts["ranges"].shape == (2, 2)
    stored = quantized.dequantize().view(300, 64).abs().amax(1)
    for group in (slice(0, 256), slice(256, 300)):
        span = c[group].max() - c[group].min()
        assert (stored[group] - c[group]).abs().max() <= span / 508 * 1.001
        assert stored[group].max() == c[group].max()
        assert stored[group].min() == c[group].min()


def test_double_scales_of_equal_blocks_are_exact() -> None:
    weights = torch.ones(1000, dtype=torch.float32) / 3
    assert torch.equal(Quantizer(4, scale="double").quantize(weights).dequantize(), weights)


def test_error_with_coarser_scales_is_hardly_larger() -> None:
    weights = gaussian(2**18)
    plain, half, double = (
        (Quantizer(4, scale=scale).quantize(weights).dequantize() - weights).norm().item()
        for scale in SCALES
    )
    assert half == pytest.approx(plain, rel=1e-3)
    assert double == pytest.approx(plain, rel=1e-2)


# --- stochastic rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", ["ternary", 2, 4, 8])
def test_stochastic_rounding_is_unbiased(bits: Bits, kind: Kind) -> None:
    """Mean of 20 000 draws within six standard errors (at most gap / 2 / sqrt(draws) each)."""
    draws, levels = 20_000, codebook(bits, kind)
    weights = gaussian(64)
    quantizer = Quantizer(bits, kind, rounding="stochastic")
    values = quantizer.quantize(weights.expand(draws, 64), seeded()).dequantize()
    c = weights.abs().max()
    expected = weights.clamp(levels[0] * c, levels[-1] * c)
    tolerance = (6 * c * levels.diff().max() / 2 / draws**0.5).item()
    torch.testing.assert_close(values.mean(0), expected, atol=tolerance, rtol=0)
    below = levels[torch.bucketize(weights / c, levels, right=True).sub(1).clamp(0)] * c
    assert (values.amin(0) >= below - 1e-6).all()


def test_stochastic_rounding_follows_the_generator_alone() -> None:
    weights = gaussian(200_000)
    quantizer = Quantizer(3, rounding="stochastic")
    first = quantizer.quantize(weights, seeded(1))
    assert same(first, quantizer.quantize(weights, seeded(1)))
    assert not same(first, quantizer.quantize(weights, seeded(2)))
    state = torch.get_rng_state()
    quantizer.quantize(weights, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_do_not_depend_on_the_length_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, quantizer = gaussian(300_000), Quantizer(3, rounding="stochastic")
    first = quantizer.quantize(weights, seeded())
    monkeypatch.setattr("fedlpp_ray.quantization.blockwise._CHUNK_CPU", 1 << 24)
    assert same(first, quantizer.quantize(weights, seeded()))


def test_levels_stay_where_they_are_under_stochastic_rounding() -> None:
    levels = codebook(4)
    weights = levels.repeat(8) * 3
    quantized = Quantizer(4, rounding="stochastic").quantize(weights, seeded())
    assert torch.equal(quantized.dequantize(), weights)


def test_stochastic_rounding_needs_a_generator() -> None:
    with pytest.raises(ValueError, match=r"needs a torch\.Generator"):
        Quantizer(4, rounding="stochastic").quantize(gaussian(64))


def test_nearest_rounding_ignores_a_generator() -> None:
    assert same(
        Quantizer(4).quantize(gaussian(640), seeded()), Quantizer(4).quantize(gaussian(640))
    )


# --- environment --------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Records the number of elements of every floating-point and integer tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.floats, self.all = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in sources:
            self.all = max(self.all, result.numel())
            if result.is_floating_point():
                self.floats = max(self.floats, result.numel())
        return result


@pytest.mark.parametrize("bits", ["ternary", 4, 8])
def test_no_large_intermediates(bits: Bits) -> None:
    """Quantizing makes nothing longer than the weights, and floats only a cache-sized run long."""
    weights, quantizer = gaussian(2**20 + 3), Quantizer(bits, "nf-symmetric")
    quantizer.levels()
    with Sizes() as sizes:
        quantized = quantizer.quantize(weights)
    assert sizes.all <= max(weights.numel(), quantized.parts["codes"].numel())
    assert sizes.floats <= 2**17
    with Sizes() as sizes:
        quantized.dequantize(torch.bfloat16)
    assert sizes.all <= weights.numel()


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("scale", SCALES)
def test_same_bits_for_any_number_of_threads(scale: Scale) -> None:
    weights, found = gaussian(2**19 + 17), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for rounding in ("nearest", "stochastic"):
            quantizer = Quantizer(3, scale=scale, rounding=rounding)  # type: ignore[arg-type]
            quantized = quantizer.quantize(weights, seeded())
            found.append((quantized, quantized.dequantize()))
    for quantized, values in found[2:]:
        reference = found[0] if quantized.quantizer.rounding == "nearest" else found[1]
        assert same(quantized, reference[0])
        assert torch.equal(values, reference[1])


def test_tables_do_not_depend_on_what_is_being_built_around_them() -> None:
    """A model may be under construction: default dtype bfloat16, default device meta."""
    weights = gaussian(900)
    expected = Quantizer(4, "lloyd-max", 90, "double", "stochastic").quantize(weights, seeded())
    Levels.of.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            for kind in KINDS:
                Levels.of(3, kind, 91, torch.device("cpu"))
        quantizer = Quantizer(4, "lloyd-max", 90, "double", "stochastic")
        quantized = quantizer.quantize(weights, seeded())
        assert same(quantized, expected)
        assert torch.equal(quantized.dequantize(), expected.dequantize())
    finally:
        torch.set_default_dtype(torch.float32)
    assert codebook(3, "nf", 91).device.type == "cpu"


# --- parts that came from elsewhere -------------------------------------------------------------


def received(quantizer: Quantizer, weights: Tensor, **changes: Tensor | None) -> QuantizedTensor:
    parts = {**quantizer.quantize(weights).tensors(), **changes}
    kept = {name: part for name, part in parts.items() if part is not None}
    return QuantizedTensor.from_parts(quantizer, weights.shape, weights.dtype, kept)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip_through_parts(bits: Bits, kind: Kind, scale: Scale) -> None:
    for weights in (gaussian(1001), gaussian(0), gaussian(3, 300).bfloat16()):
        quantizer = Quantizer(bits, kind, scale=scale)
        quantized = received(quantizer, weights)
        assert torch.equal(quantized.dequantize(), quantizer.quantize(weights).dequantize())


U8, F32 = torch.uint8, torch.float32


@pytest.mark.parametrize(
    ("quantizer", "changes", "message"),
    [
        (Quantizer(4), {"codes": None}, r"parts must be \['codes', 'scales'\], got \['scales'\]"),
        (Quantizer(4), {"extra": torch.zeros(1)}, "parts must be"),
        (Quantizer(4), {"codes": torch.zeros(63, dtype=U8)}, r"'codes' must be torch.uint8 of sha"),
        (Quantizer(4), {"codes": torch.zeros(64, dtype=torch.int8)}, "got torch.int8"),
        (Quantizer(4), {"codes": torch.zeros((64, 1), dtype=U8)}, "of shape"),
        (Quantizer(4), {"scales": torch.ones(3)}, "'scales' must be"),
        (Quantizer(4), {"scales": torch.ones(2).half()}, "'scales' must be torch.float32"),
        (Quantizer(4), {"scales": torch.tensor([1.0, -1.0])}, "negative, infinite or not a n"),
        (Quantizer(4), {"scales": torch.tensor([1.0, float("nan")])}, "not a number"),
        (Quantizer(4), {"scales": torch.tensor([1.0, float("inf")])}, "infinite"),
        (Quantizer(4, "int"), {"codes": torch.full((64,), 255, dtype=U8)}, "outside the 15 levels"),
        (Quantizer("ternary"), {"codes": torch.full((26,), 243, dtype=U8)}, "outside the 3 levels"),
        (Quantizer(8, "int"), {"codes": torch.full((128,), 255, dtype=U8)}, "outside the 255 lev"),
        (Quantizer(8, "nf-symmetric"), {"codes": torch.full((144,), 255, dtype=U8)}, "the 257 lev"),
        (Quantizer(4, scale="double"), {"ranges": None}, "parts must be"),
        (Quantizer(4, scale="double"), {"ranges": torch.tensor([[2.0, 1.0]])}, "above its largest"),
        (Quantizer(4, scale="double"), {"ranges": torch.tensor([[-1.0, 1.0]])}, "negative"),
        (Quantizer(4, scale="double"), {"ranges": torch.tensor([[0, float("inf")]])}, "infinite"),
    ],
)
def test_corrupted_parts_are_refused(
    quantizer: Quantizer, changes: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        received(quantizer, gaussian(128), **changes)


def test_impossible_headers_are_refused() -> None:
    parts = Quantizer(4).quantize(gaussian(128)).tensors()
    for shape in [(-128,), (-1, -128), (128.0,)]:
        with pytest.raises(ValueError, match="shape must hold non-negative integers"):
            QuantizedTensor.from_parts(Quantizer(4), shape, F32, parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        QuantizedTensor.from_parts(Quantizer(4), (128,), torch.int32, parts)
    with pytest.raises(ValueError, match="'codes' must be"):
        QuantizedTensor.from_parts(Quantizer(4), (2**40,), F32, parts)


@pytest.mark.parametrize(
    ("bits", "kind"), [("ternary", "nf"), *((bits, kind) for bits in (2, 4) for kind in KINDS)]
)
def test_cells_hold_the_weights_and_end_where_another_code_begins(bits: Bits, kind: Kind) -> None:
    quantizer = Quantizer(bits, kind, 64)
    weights = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    found = quantizer.quantize(weights)
    low, high = found.cells()
    assert low.shape == high.shape == weights.shape
    slack = 1e-6 * weights.abs().max()  # the scale's inverse is rounded
    assert ((low - slack <= weights) & (weights <= high + slack)).all()
    # Just above the cell's end, in blocks whose scale that does not change, is another code.
    inner = high < found.dequantize().abs().max(dim=1, keepdim=True).values * 0.5
    beyond = quantizer.quantize(torch.where(inner, high + 1e-3, weights)).dequantize()
    assert (beyond[inner] > found.dequantize()[inner]).all()


def test_stochastic_rounding_has_no_cells() -> None:
    quantizer = Quantizer(2, "nf", 64, "fp32", "stochastic")
    found = quantizer.quantize(torch.randn(64), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no cells"):
        found.cells()
