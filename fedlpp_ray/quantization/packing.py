"""Bit packing: codes 0..levels-1 to bytes and back, with no padding beyond whole bytes.

Two layouts, chosen by the number of levels alone. In both, every byte gathers codes that lie far
apart in the tensor ("planar lanes"), so that packing is a few whole-array operations.

* Lanes. A code of ceil(log2 levels) bits is split, from its low end, in parts of 8, 4, 2 and 1
  bits. A part of w bits fills L = ``ceil(n w / 8)`` bytes: byte i holds the codes i, i + L,
  i + 2L, ... of 8/w contiguous lanes of length L, the first lane in the low bits. Widest part
  first, for instance 5 bits = 4 + 1::

      | b b b b a a a a | ... ceil(n / 2) bytes | h g f e d c b a | ... ceil(n / 8) bytes

* Radix. Where m codes fit in a byte as digits in base ``levels`` and that is tighter (3 levels: 5 a
  byte, 1.6 bits; 5 levels: 3 a byte), byte i is sum_j code[i + j L] * levels^j, L = ceil(n / m).
"""

import math
from functools import cache

import torch
from torch import Tensor


def packed_bytes(numel: int, levels: int) -> int:
    """Return the exact number of bytes :func:`pack` makes of ``numel`` codes below ``levels``.

    Raises ``ValueError`` unless ``levels`` is from 2 to 512.
    """
    if not 2 <= levels <= 512:
        raise ValueError(f"levels must be from 2 to 512, got {levels}")
    digits = _digits_per_byte(levels)
    if digits:
        return -(-numel // digits)
    return sum(_lane_length(numel, width) for _, width in _parts(levels))


def pack(codes: Tensor, levels: int) -> Tensor:
    """Pack integer ``codes`` (any shape, each in 0..levels-1) to uint8 of ``(packed_bytes,)``.

    The codes are trusted to lie in range.
    """
    codes = codes.reshape(-1)
    packed = codes.new_zeros(packed_bytes(codes.numel(), levels), dtype=torch.uint8)
    digits = _digits_per_byte(levels)
    if digits:
        for j, lane in enumerate(_lanes(codes, packed)):
            packed[: lane.numel()].add_(lane, alpha=levels**j)
        return packed
    end = 0
    for low, width in _parts(levels):
        start, end = end, end + _lane_length(codes.numel(), width)
        _pack_part(codes, low, width, packed[start:end])
    return packed


def unpack(packed: Tensor, levels: int, numel: int) -> Tensor:
    """Return the ``numel`` codes of ``packed``: uint8 ``(numel,)``, or int16 above 256 levels.

    A radix byte that no codes can make gives codes equal to ``levels``, which a caller can refuse.
    Raises ``ValueError`` if ``packed`` has not exactly ``packed_bytes(numel, levels)`` bytes.
    """
    size = packed_bytes(numel, levels)
    if packed.numel() != size:
        raise ValueError(
            f"{numel} codes of {levels} levels take {size} bytes, got {packed.numel()}"
        )
    dtype = torch.uint8 if levels <= 256 else torch.int16
    codes = torch.zeros(numel, dtype=dtype, device=packed.device)
    digits = _digits_per_byte(levels)
    if digits:
        index = packed.int()
        for table, lane in zip(_digit_tables(levels), _lanes(codes, packed), strict=False):
            torch.index_select(table.to(packed.device), 0, index[: lane.numel()], out=lane)
        return codes
    end = 0
    for low, width in _parts(levels):
        start, end = end, end + _lane_length(numel, width)
        _unpack_part(packed[start:end], low, width, codes)
    return codes


def _digits_per_byte(levels: int) -> int:
    """How many base-``levels`` digits go in a byte, or 0 where lanes are at least as tight."""
    digits = int(math.log(256.5, levels))
    return digits if digits * (levels - 1).bit_length() > 8 else 0


def _parts(levels: int) -> list[tuple[int, int]]:
    """The (lowest bit, width) of the parts of a code, widest first."""
    parts, low, bits = [], 0, (levels - 1).bit_length()
    for width in (8, 4, 2, 1):
        if bits & width:
            parts.append((low, width))
            low += width
    return parts


def _lanes(codes: Tensor, packed: Tensor) -> list[Tensor]:
    """``codes`` in pieces as long as ``packed``; the last may be shorter, some may be missing."""
    length = max(1, packed.numel())
    return [codes[start : start + length] for start in range(0, codes.numel(), length)]


def _lane_length(numel: int, width: int) -> int:
    return -(-numel * width // 8)


def _pack_part(codes: Tensor, low: int, width: int, packed: Tensor) -> None:
    """Add the bits ``low..low+width-1`` of every code in its place in the zeroed ``packed``."""
    mask = (1 << width) - 1
    for place, lane in zip(range(0, 8, width), _lanes(codes, packed), strict=False):
        bits = (lane >> low).bitwise_and_(mask).to(torch.uint8)
        packed[: lane.numel()].add_(bits, alpha=1 << place)


def _unpack_part(packed: Tensor, low: int, width: int, codes: Tensor) -> None:
    """Add the bits of ``packed`` in their place in the zeroed ``codes``: undoes `_pack_part`."""
    mask = (1 << width) - 1
    for place, lane in zip(range(0, 8, width), _lanes(codes, packed), strict=False):
        bits = (packed[: lane.numel()] >> place).bitwise_and_(mask)
        lane.add_(bits, alpha=1 << low)


@cache
def _digit_tables(levels: int) -> tuple[Tensor, ...]:
    """For each digit a table from byte to value; ``levels`` where no codes make the byte."""
    byte = torch.arange(256, device="cpu")
    digits = _digits_per_byte(levels)
    impossible = byte >= levels**digits
    return tuple(
        (byte // levels**j % levels).masked_fill(impossible, levels).to(torch.uint8)
        for j in range(digits)
    )
