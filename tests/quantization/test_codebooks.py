"""Codebooks against published values, bitsandbytes' table and their own definitions."""

import math
import time

import pytest
import torch

from fedlpp_ray.quantization import Bits, Kind, codebook
from fedlpp_ray.quantization.lloyd_max import lloyd_max_levels

KINDS: list[Kind] = ["nf", "nf-symmetric", "lloyd-max", "int"]
BITS: list[Bits] = ["ternary", 2, 3, 4, 5, 6, 7, 8]


def expected_size(bits: Bits, kind: Kind) -> int:
    if bits == "ternary":
        return 3
    return 2 ** int(bits) + {"nf": 0, "nf-symmetric": 1, "lloyd-max": 0, "int": -1}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_codebook_is_ascending_within_the_unit_interval(bits: Bits, kind: Kind) -> None:
    levels = codebook(bits, kind)
    assert levels.dtype == torch.float32
    assert levels.shape == (expected_size(bits, kind),)
    assert (levels.diff() > 0).all()
    assert levels.abs().max() <= 1
    symmetric = kind != "nf" or bits == "ternary"
    assert torch.equal(levels, -levels.flip(0)) == symmetric
    if kind != "lloyd-max" or bits == "ternary":
        assert (levels == 0).sum() == 1
        assert (levels[0], levels[-1]) == (-1, 1)


def test_normal_float_reference_values() -> None:
    two = torch.tensor([-1, 0, 0.3379, 1])
    three = torch.tensor([-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1])
    torch.testing.assert_close(codebook(2), two, atol=5e-5, rtol=0)
    torch.testing.assert_close(codebook(3), three, atol=5e-5, rtol=0)


def test_four_bits_is_bitsandbytes_nf4_to_the_last_bit() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebook(4), functional.get_4bit_type("nf4", device="cpu"))


def test_symmetric_map_mirrors_the_positive_side() -> None:
    for bits in range(2, 9):
        positive = codebook(bits)[codebook(bits) > 0]
        symmetric = codebook(bits, "nf-symmetric")
        assert torch.equal(symmetric[symmetric > 0], positive)


def test_integer_grid_is_uniform() -> None:
    torch.testing.assert_close(codebook(3, "int") * 3, torch.arange(-3.0, 4.0))
    assert codebook(8, "int").numel() == 255


@pytest.mark.parametrize(("bits", "positive"), [(2, [0.173, 0.588]), (3, [0.09, 0.28, 0.51, 0.83])])
def test_lloyd_max_reference_values(bits: int, positive: list[float]) -> None:
    levels = codebook(bits, "lloyd-max", block=64)
    torch.testing.assert_close(levels[levels > 0], torch.tensor(positive), atol=0.01, rtol=0)


@pytest.mark.parametrize(("bits", "block"), [(2, 8), (3, 64), (4, 64), (3, 1024)])
def test_lloyd_max_levels_are_the_centroids_of_their_cells(bits: int, block: int) -> None:
    """Monte Carlo, 4M weights: each level is the c^2-weighted mean of u over its cell, to 1 %."""
    weights = torch.randn(2**22 // block, block, generator=torch.Generator().manual_seed(0))
    c = weights.abs().amax(1, keepdim=True)
    u, weight = (weights / c).view(-1).double(), (c**2).expand_as(weights).reshape(-1).double()
    levels = codebook(bits, "lloyd-max", block).double()
    cell = torch.bucketize(u, (levels[1:] + levels[:-1]) / 2)
    total = torch.zeros_like(levels).index_add_(0, cell, weight)
    centroids = torch.zeros_like(levels).index_add_(0, cell, weight * u) / total
    torch.testing.assert_close(centroids, levels, rtol=0.01, atol=1e-4)


def test_lloyd_max_is_rounded_quick_and_adapts_to_the_block() -> None:
    levels = codebook(4, "lloyd-max", 64)
    assert torch.equal(levels, levels.double().mul(1e6).round().div(1e6).float())
    assert codebook(4, "lloyd-max", 256)[-1] < levels[-1]
    start = time.perf_counter()
    lloyd_max_levels(128, 96)
    assert time.perf_counter() - start < 2


def test_a_caller_may_change_its_copy() -> None:
    codebook(4).zero_()
    assert codebook(4)[0] == -1


@pytest.mark.parametrize(
    ("bits", "kind", "block", "message"),
    [
        (1, "nf", 64, "'ternary'"),
        (9, "nf", 64, "from 2 to 8, got 9"),
        (0, "int", 64, "from 2 to 8"),
        (True, "nf", 64, "from 2 to 8"),
        (4.0, "nf", 64, "from 2 to 8"),
        ("4", "nf", 64, "from 2 to 8"),
        (4, "nf4", 64, "nf, nf-symmetric, lloyd-max, int, got 'nf4'"),
        (4, "nf", 7, "from 8 to 65536, got 7"),
        (4, "nf", 65537, "from 8 to 65536"),
        (4, "nf", 64.0, "from 8 to 65536"),
    ],
)
def test_what_does_not_exist_is_refused(
    bits: object, kind: object, block: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        codebook(bits, kind, block)  # type: ignore[arg-type]


def test_offset_is_the_same_for_every_k() -> None:
    """The second-largest level of NF-k follows from the offset alone."""
    top = math.sqrt(2) * torch.erfinv(torch.tensor(2 * 0.9677083 - 1, dtype=torch.float64))
    for bits in range(2, 9):
        step = (0.9677083 - 0.5) / 2 ** (bits - 1)
        second = torch.erfinv(torch.tensor(2 * (0.9677083 - step) - 1, dtype=torch.float64))
        assert codebook(bits)[-2].item() == pytest.approx(
            float(math.sqrt(2) * second / top), abs=1e-6
        )
