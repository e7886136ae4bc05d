"""What a sender may do so that its codes and scales say less, without the receiver's knowing.

What is sent is decoded as ever, scale times level, and takes as many bytes; only a dither that is
subtracted needs a receiver that has the draws. docs/defences.md has the derivations. Here
c = max|block| and s = w / c is a weight of the block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlpp_ray.quantization.blockwise import Choice, QuantizedTensor, Quantizer
from fedlpp_ray.quantization.rounding import Levels, uniform
from fedlpp_ray.quantization.scales import FORMATS

Magnitude = Literal["absmax", "norm"]
"""What the scale that is sent preserves of a block."""

ROOM = 2.0**0.5
"""How far, as a factor, c may be from a scale that is held."""

_ROUNDED = 2.0**-20
"""Bound of what float32 arithmetic does to s, and to sums over a block, relative."""


@dataclass(frozen=True)
class Guard:
    """How codes and scales are chosen beyond what a `Quantizer` says. By default as it says.

    Attributes:
        hysteresis: a code changes only when s is beyond the end of its cell by more than so many
            halves of the gap there.
        hold_scales: a block's scale stays while its c is within a factor `ROOM` of it. Meanwhile
            larger values are sent as the outermost levels.
        dithered: the boundary in each gap is at a random part of it, drawn for each weight.
        subtracted: the receiver has the draws, and takes off what a dither adds. Levels are at
            equal distances; with neither margin, held scales nor norm.
        magnitude: ``"absmax"``: the scale is c; ``"norm"``: the scale that gives the block that is
            sent the L2 norm of the block, while the codes are chosen against c.
    """

    hysteresis: float = 0.0
    hold_scales: bool = False
    dithered: bool = False
    magnitude: Magnitude = "absmax"
    subtracted: bool = False

    @property
    def remembers(self) -> bool:
        """Whether it needs what was sent before."""
        return self.hysteresis > 0 or self.hold_scales

    def quantize(
        self,
        quantizer: Quantizer,
        tensor: Tensor,
        before: QuantizedTensor | None = None,
        generator: torch.Generator | None = None,
    ) -> QuantizedTensor:
        """Quantize, under the guard.

        Args:
            quantizer: codebook, block, storage of scales, rounding.
            tensor: of any shape, on the CPU or a GPU.
            before: what was sent last, of the same shape, by the same quantizer.
            generator: needed where the rounding is stochastic or dithered.

        Raises:
            ValueError: as `Quantizer.quantize`, which also says of what.
        """
        if self == UNGUARDED:
            return quantizer.quantize(tensor, generator)
        weights, form = tensor.detach().reshape(-1), FORMATS[quantizer.scale]
        absmax = quantizer.absmax(weights)
        scales, stored = absmax, {}
        if self.magnitude == "absmax":
            stored = form.encode(self._held(absmax, before))
            scales = form.decode(stored)
        if self._draws(quantizer) and generator is None:
            raise ValueError("stochastic rounding and dither need a torch.Generator")
        draws = generator if self._draws(quantizer) else None
        choose = self._choice(quantizer.levels(weights.device), scales, before, draws)
        codes = quantizer.codes(weights, scales, choose)
        if self.magnitude == "norm":
            stored = form.encode(_norm_scales(quantizer, weights, codes, absmax))
        return quantizer.packed(tensor, codes, stored)

    def dequantize(self, sent: QuantizedTensor, draws: Tensor | None = None) -> Tensor:
        """What a receiver reads, float32, of the original shape.

        Subtracted: with boundaries at the part v of each gap, the code is that of the level nearest
        to s + (1/2 - v) step, and c (level - (1/2 - v) step) is read. The error is uniform over one
        step of c and independent of s (Schuchman 1964). No value is beyond the outermost levels by
        more than half a step, so there is no overload.

        Args:
            sent: the message.
            draws: v, as `draw` has them; needed where they are subtracted.
        """
        if not self.subtracted:
            return sent.dequantize(torch.float32)
        levels = sent.quantizer.levels(sent.parts["codes"].device)
        assert draws is not None
        s = levels.look_up(sent.codes()) + (draws - 0.5) * levels.step
        return _flat(_rows(s, sent) * sent.scales()[:, None], sent)

    def cells(
        self,
        sent: QuantizedTensor,
        before: QuantizedTensor | None = None,
        *,
        first: bool = False,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What one who knows the guard concludes from a message; not the draws but of `subtracted`.

        Hysteresis widens a cell by the margin. A code that has just changed is in its cell without
        the margin, and outside of the old one with it. Unknown boundaries widen a cell to the
        neighbouring levels, and held scales the outermost ones by the room. Of a scale that
        preserves the norm, c is bounded by the codes: with N = ||block||, N^2 <= c^2 sum max s^2,
        and N^2 >= c^2 (1 + sum min s^2) over all weights but the largest. Who has the draws knows
        the boundaries: the cell is one step of c around what is read.

        Args:
            sent: the message.
            before: the one before it from the same sender; None: not known.
            first: there was none before it.
            draws: as for `dequantize`.

        Returns:
            The lowest and highest value of each weight, float32, of the original shape: the
            sender's are inside, whatever the storage of scales.
        """
        low, high = self._normalised(sent, before, first, draws)
        if self.hold_scales and not first:
            held = sent.scales() > 0 if before is None else sent.scales() == before.scales()
            low = torch.where(held[:, None] & (low <= -1), -ROOM, low)
            high = torch.where(held[:, None] & (high >= 1), ROOM, high)
        low, high = low - 2 * _ROUNDED, high + 2 * _ROUNDED
        least, most = self._scales(sent, low, high)
        lowest = torch.minimum(low * least, low * most)
        highest = torch.maximum(high * least, high * most)
        return tuple(_flat(x, sent) for x in (lowest, highest))  # type: ignore[return-value]

    def _draws(self, quantizer: Quantizer) -> bool:
        return self.dithered or quantizer.rounding == "stochastic"

    def _held(self, absmax: Tensor, before: QuantizedTensor | None) -> Tensor:
        """The scales that are sent where they are c."""
        if before is None or not self.hold_scales:
            return absmax
        old = before.scales()
        return torch.where((old <= ROOM * absmax) & (absmax <= ROOM * old), old, absmax)

    def _choice(
        self,
        levels: Levels,
        scales: Tensor,
        before: QuantizedTensor | None,
        generator: torch.Generator | None,
    ) -> Choice:
        """How codes are chosen. Those of a block that was zero are none to keep."""
        codes, known = None, scales > 0
        if before is not None and self.hysteresis:
            codes, known = before.codes(), before.scales() > 0

        def choose(s: Tensor, run: slice, blocks: slice) -> Tensor:
            draws = None if generator is None else uniform(s, scales[blocks], generator)
            fresh = levels.nearest(s.view(-1)) if draws is None else levels.stochastic(s, draws)
            if codes is None:
                return fresh
            kept = levels.sticky(s, draws, codes[run].view_as(s), self.hysteresis)
            return torch.where(known[blocks, None], kept, fresh.view_as(s))

        return choose

    def _normalised(
        self,
        sent: QuantizedTensor,
        before: QuantizedTensor | None,
        first: bool,
        draws: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The cells of s, ``(blocks, block)``, with zeros where the last block is short."""
        levels = sent.quantizer.levels(sent.parts["codes"].device)
        if self.subtracted:
            assert draws is not None
            level, step = levels.look_up(sent.codes()), levels.step
            cell = level + (draws - 1) * step, level + draws * step
            low, high = (_rows(end.clamp(-1, 1), sent) for end in cell)
            return low, high
        reach, half = 1.0 if self._draws(sent.quantizer) else 0.5, self.hysteresis / 2
        codes = _rows(sent.codes().long(), sent)
        plain, wide = levels.cells(reach), levels.cells(reach + half)
        if first or not half:
            return plain[0][codes], plain[1][codes]
        low, high = wide[0][codes], wide[1][codes]
        if before is None:
            return low, high
        # An old cell is left beyond the nearest place where its boundary can have been.
        inner = levels.cells(1 - reach + half)
        old, fresh = _rows(before.codes().long(), sent), (before.scales() == 0)[:, None]
        up, down = (codes > old) & ~fresh, (codes < old) & ~fresh
        changed = (codes != old) | fresh
        low = torch.where(changed, plain[0][codes], low)
        high = torch.where(changed, plain[1][codes], high)
        low = torch.where(up, torch.maximum(low, inner[1][old]), low)
        return low, torch.where(down, torch.minimum(high, inner[0][old]), high)

    def _scales(self, sent: QuantizedTensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest c, ``(blocks, 1)``, that the message leaves."""
        scales, slack = sent.scales(), FORMATS[sent.quantizer.scale].slack(sent.parts)
        least, most = (scales - slack).clamp(min=0), scales + slack
        if self.magnitude == "norm":
            levels = sent.quantizer.levels(scales.device)
            size = _rows(levels.look_up(sent.codes()), sent).double().norm(dim=1)
            far = torch.maximum(low.abs(), high.abs()).double()
            near = torch.maximum(low, -high).clamp(min=0).double()
            inside = _rows(torch.ones(sent.numel, device=scales.device), sent)
            far, near = far * inside, near * inside
            smallest = (near**2).sum(1) + 1 - near.amax(1) ** 2
            known = size > 0  # otherwise the scale is c
            bound = (least * size / far.norm(dim=1) * (1 - _ROUNDED)).float()
            least = torch.where(known, bound, least)
            most = torch.where(
                known, (most * size / smallest.sqrt() * (1 + _ROUNDED)).float(), most
            )
        return least[:, None], most[:, None]


UNGUARDED = Guard()
"""As the quantizer says."""


def draw(numel: int, generator: torch.Generator) -> Tensor:
    """What `Guard.quantize` draws for a tensor from a CPU generator, float32 ``(numel,)``."""
    return torch.rand(numel, generator=generator)


def _norm_scales(quantizer: Quantizer, weights: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """||block|| / ||levels of its codes||, float32 ``(blocks,)``; c where all of these are 0."""
    levels, scales = quantizer.levels(weights.device), absmax.clone()
    for run, blocks in quantizer.runs(weights.numel(), weights.device):
        count = len(absmax[blocks])
        size = levels.look_up(codes[run]).view(count, -1).double().norm(dim=1)
        norm = weights[run].double().view(count, -1).norm(dim=1)
        scales[blocks] = torch.where(size > 0, norm / size, absmax[blocks].double()).float()
    return scales


def _rows(flat: Tensor, sent: QuantizedTensor) -> Tensor:
    """Values of a message's weights by block, ``(blocks, block)``, with zeros at the end."""
    block = sent.quantizer.block
    return torch.nn.functional.pad(flat, (0, -sent.numel % block)).view(-1, block)


def _flat(rows: Tensor, sent: QuantizedTensor) -> Tensor:
    return rows.reshape(-1)[: sent.numel].view(sent.shape)
