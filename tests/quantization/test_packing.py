"""Packing: exact sizes, by hand, and round trips for every alphabet."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_ray.quantization import pack, packed_bytes, unpack


def random_codes(numel: int, levels: int, seed: int = 0) -> torch.Tensor:
    codes = torch.randint(levels, (numel,), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.uint8 if levels <= 256 else torch.int16)


@pytest.mark.parametrize("levels", range(2, 513))
def test_round_trip_for_every_alphabet(levels: int) -> None:
    for numel in (0, 1, 2, 7, 8, 9, 1000):
        codes = random_codes(numel, levels)
        before = codes.clone()
        packed = pack(codes, levels)
        assert packed.dtype == torch.uint8
        assert packed.shape == (packed_bytes(numel, levels),)
        assert torch.equal(unpack(packed, levels, numel), before)
        assert torch.equal(codes, before)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 257), st.integers(0, 500), st.integers(0, 2**31))
def test_round_trip_property(levels: int, numel: int, seed: int) -> None:
    codes = random_codes(numel, levels, seed)
    assert torch.equal(unpack(pack(codes, levels), levels, numel), codes)


@pytest.mark.parametrize(
    ("levels", "numel", "size"),
    [
        (3, 1000, 200),  # five trits a byte
        (3, 1001, 201),
        (5, 999, 333),  # three digits a byte
        (4, 1000, 250),
        (7, 800, 300),
        (8, 800, 300),  # 3 bits: exactly 3/8
        (8, 801, 302),  # ceil(801/4) + ceil(801/8)
        (9, 800, 400),
        (16, 801, 401),
        (32, 800, 500),
        (64, 800, 600),
        (128, 800, 700),
        (256, 801, 801),
        (257, 800, 900),  # 8 + 1 bits
        (16, 0, 0),
        (3, 0, 0),
    ],
)
def test_sizes_by_hand(levels: int, numel: int, size: int) -> None:
    assert packed_bytes(numel, levels) == size
    assert pack(random_codes(numel, levels), levels).numel() == size


@pytest.mark.parametrize("levels", range(2, 513))
def test_never_above_the_bits_of_the_alphabet(levels: int) -> None:
    bits = math.ceil(math.log2(levels))
    assert packed_bytes(8000, levels) <= 1000 * bits


def test_layout_of_lanes() -> None:
    codes = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4], dtype=torch.uint8)
    low = [1 | 3 << 2 | (5 & 3) << 4 | (7 & 3) << 6, 2 | 0 << 2 | (6 & 3) << 4 | 0 << 6]
    assert pack(codes, 8).tolist() == [*low, 0b11110000]


def test_layout_of_radix() -> None:
    codes = torch.tensor([2, 1, 0, 2, 1, 1], dtype=torch.uint8)  # two bytes: lanes of length 2
    assert pack(codes, 3).tolist() == [2 + 0 * 3 + 1 * 9, 1 + 2 * 3 + 1 * 9]


def test_lanes_where_radix_is_no_tighter() -> None:
    assert pack(torch.tensor([14, 1], dtype=torch.uint8), 15).tolist() == [14 | 1 << 4]


def test_impossible_radix_bytes_are_recognisable() -> None:
    assert unpack(torch.tensor([243], dtype=torch.uint8), 3, 5).tolist() == [3] * 5


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="take 5 bytes, got 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 16, 10)
    with pytest.raises(ValueError, match="from 2 to 512, got 1"):
        packed_bytes(10, 1)


def test_any_shape_is_flattened() -> None:
    codes = random_codes(64, 16).view(8, 8).t()
    assert torch.equal(unpack(pack(codes, 16), 16, 64), codes.reshape(-1))
