"""From a normalised weight s = w / c to the index of a level: nearest, or stochastic.

Nearest, precisely: s is float32; code = the number of midpoints ``(level[i] + level[i+1]) / 2``,
rounded to float32, that lie strictly below s. So the lower index wins a tie, and bitsandbytes'
4-bit codes are met bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedlpp_ray.quantization.codebooks import Bits, Kind, codebook

_HALF = 1024
"""Cells of the lookup grid over s in [0, 1]; as many again over [-1, 0]."""

_MARGIN = 2**-8
"""Part of a cell by which a rounded cell index may be off; the true bound is 2^-13."""


@dataclass(frozen=True, eq=False)
class Levels:
    """A codebook on a device, with what rounding to it needs.

    Attributes:
        values: the ascending float32 levels, ``(levels,)``.
        midpoints: the decision boundaries between them, ``(levels - 1,)``.

    """

    values: Tensor
    midpoints: Tensor
    _grid: tuple[Tensor, Tensor, Tensor]
    _pairs: Tensor

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, bits: Bits, kind: Kind, block: int, device: torch.device) -> "Levels":
        """Build the levels of ``codebook(bits, kind, block)`` on ``device`` (cached)."""
        values = codebook(bits, kind, block)
        midpoints = (values[1:] + values[:-1]) / 2
        with torch.device("cpu"):
            grid, pairs = _lookup_grid(midpoints), _pair_table(values)
        return cls(values.to(device), midpoints.to(device), grid, pairs.to(device))

    @property
    def step(self) -> float:
        """The mean distance of two levels; of a uniform codebook that of any two neighbours."""
        ends = self.values[-1] - self.values[0]
        return float(ends) / (self.values.numel() - 1)

    @property
    def code_dtype(self) -> torch.dtype:
        """The narrowest integer type that holds every code."""
        return torch.uint8 if self.values.numel() <= 256 else torch.int16

    def look_up(self, codes: Tensor) -> Tensor:
        """Return the float32 levels of ``codes``, shape ``(n,)``: two per access where possible."""
        even = codes.numel() % 2 == 0 and codes.storage_offset() % 2 == 0
        if even and self._pairs.numel():
            return self._pairs.index_select(0, codes.view(torch.int16).int()).view(torch.float32)
        bits = self.values.view(torch.int32)  # torch gathers integers faster than floats
        return bits.index_select(0, codes.int()).view(torch.float32)

    def nearest(self, s: Tensor) -> Tensor:
        """Return the codes of the levels nearest to float32 ``s`` in [-1, 1], int32 ``(n,)``."""
        if s.device.type != "cpu":
            return torch.bucketize(s, self.midpoints, out_int32=True)
        first, boundary, half = self._grid
        cell = torch.add(half, s, alpha=_HALF).int()
        below = boundary.index_select(0, cell).view(torch.float32).sub_(s)
        return first.index_select(0, cell).sub_(below.view(torch.int32).bitwise_right_shift_(31))

    def stochastic(self, s: Tensor, draws: Tensor) -> Tensor:
        """Return codes that are right on average: one of the two levels around every ``s``, int32.

        ``draws`` are uniform in [0, 1), of the shape of ``s``: the upper level is taken with the
        probability (s - lower) / (upper - lower). Beyond the outermost levels s is clamped.
        """
        last = self.values.numel() - 2
        lower = torch.bucketize(s, self.values, right=True, out_int32=True).sub_(1).clamp_(0, last)
        start, end = self.values[lower], self.values[lower + 1]
        return lower + (draws < (s - start) / (end - start))

    def sticky(self, s: Tensor, draws: Tensor | None, before: Tensor, margin: float) -> Tensor:
        """Return codes that stay as they were while ``s`` is near their cell, int32.

        The boundary between two levels is their midpoint, or where ``draws`` have it: at that part
        of the gap. Code i is left for i + 1 only beyond the boundary by more than ``margin`` times
        half the gap, and so downwards: with a margin of 1 and midpoints, where s passes the next
        level itself. What is left is rounded anew.

        Args:
            s: normalised weights.
            draws: in [0, 1], of its shape, as for `stochastic`; None rounds to nearest.
            before: the codes as they were, of its shape.
            margin: in half gaps, not negative.
        """
        found = self.nearest(s.view(-1)).view_as(s) if draws is None else self.stochastic(s, draws)
        part, half = 0.5 if draws is None else draws, margin / 2
        last = self.values.numel() - 1
        start, gap = self.values, self.values.diff()
        up, down = before.int().clamp(max=last - 1), before.int().sub(1).clamp(min=0)
        left = (before < last) & (s > start[up] + (part + half) * gap[up])
        left |= (before > 0) & (s < start[down] + (part - half) * gap[down])
        return torch.where(left, found, before.int())

    def cells(self, reach: float = 0.5) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest s of each code, ``(levels,)`` each, within [-1, 1].

        ``reach`` is the part of the gap to the neighbouring level that a cell extends over: one
        half with rounding to nearest. The outermost cells end at -1 and 1.
        """
        gap, end = self.values.diff(), self.values.new_ones(1)
        low = self.midpoints if reach == 0.5 else self.values[1:] - reach * gap
        high = self.midpoints if reach == 0.5 else self.values[:-1] + reach * gap
        return torch.cat([-end, low]).clamp(-1, 1), torch.cat([high, end]).clamp(-1, 1)


def uniform(s: Tensor, scales: Tensor, generator: torch.Generator) -> Tensor:
    """Draws in [0, 1) of the shape of ``s``, the same on every device; 1 in blocks of scale 0."""
    draws = torch.rand(s.shape, generator=generator, dtype=s.dtype, device=generator.device)
    return draws.to(s.device).where(scales[:, None] > 0, 1.0)


def _pair_table(values: Tensor) -> Tensor:
    """From two adjacent uint8 codes, read as one int16, to their two levels as one int64.

    Empty above 128 levels, where that int16 may be negative and the table outgrows the cache.
    """
    if values.numel() > 128:
        return torch.empty(0, dtype=torch.int64)
    codes = torch.arange(values.numel(), dtype=torch.uint8)
    pairs = torch.cartesian_prod(codes, codes)
    keys = pairs.view(torch.int16).view(-1).long()
    table = torch.zeros(int(keys.max()) + 1, dtype=torch.int64)
    table[keys] = values[pairs.long()].view(torch.int64).view(-1)
    return table


def _lookup_grid(midpoints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell of the grid: the midpoints below it, and the next one, as float32 bits.

    The third tensor is the grid's origin, ``_HALF`` as a float32 scalar.

    A cell is widened by the margin on both sides and must hold at most one midpoint; then
    ``first + (s > boundary)`` is exact for every s whose rounded index is this cell.
    """
    edges = torch.arange(2 * _HALF + 2, dtype=torch.float64)
    low, high = (edges[:-1] - _MARGIN) / _HALF - 1, (edges[1:] + _MARGIN) / _HALF - 1
    first, last = (torch.bucketize(edge, midpoints.double()) for edge in (low, high))
    if (last - first).max() > 1:
        raise ValueError("two decision boundaries share a cell of the lookup grid")
    boundary = torch.cat([midpoints, midpoints.new_tensor([2.0])])[first]
    return first.int(), boundary.view(torch.int32), midpoints.new_tensor(_HALF)
