"""How the scale of every block, c = max|block|, is stored: float32, float16, or 8-bit codes.

A format turns the vector of scales into named tensors and back, says what tensors to expect, and
checks those that came from elsewhere. Codes are computed against the *decoded* scale, so a coarse
scale costs resolution but adds no error of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["fp32", "fp16", "double"]
"""Storage of the block scales; ``"double"`` is a second, 8-bit quantization of them (QLoRA)."""

Spec = tuple[torch.dtype, tuple[int, ...]]
"""Data type and shape of one stored tensor."""

_GROUP = 256
"""Blocks that share one (smallest, largest) pair in the ``"double"`` format."""


class ScaleFormat(ABC):
    """One way of storing the block scales."""

    @abstractmethod
    def parts(self, blocks: int) -> dict[str, Spec]:
        """Return the tensors that store ``blocks`` scales."""

    @abstractmethod
    def encode(self, absmax: Tensor) -> dict[str, Tensor]:
        """Store finite, non-negative float32 scales of shape ``(blocks,)``.

        A zero is stored exactly, and nothing else is stored as zero. Raises ``ValueError`` for a
        scale beyond the format's range.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the stored scales as float32, shape ``(blocks,)``."""

    @abstractmethod
    def slack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return how far a scale may have been from what is stored, float32 ``(blocks,)``."""

    @abstractmethod
    def check(self, parts: Mapping[str, Tensor]) -> None:
        """Raise ``ValueError`` unless the values (sizes are known to fit) can be decoded."""


@dataclass(frozen=True)
class _Plain(ScaleFormat):
    """``scales``: one float per block. A positive scale below the dtype's range takes its least."""

    dtype: torch.dtype

    def parts(self, blocks: int) -> dict[str, Spec]:
        return {"scales": (self.dtype, (blocks,))}

    def encode(self, absmax: Tensor) -> dict[str, Tensor]:
        stored = absmax.to(self.dtype)
        if not stored.isfinite().all():
            largest = absmax.max().item()
            raise ValueError(f"block scale {largest:g} exceeds {self.dtype}: use scale='fp32'")
        info = torch.finfo(self.dtype)
        vanished = (stored == 0) & (absmax > 0)
        return {"scales": stored.masked_fill(vanished, info.smallest_normal * info.eps)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["scales"].float()

    def slack(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales, info = self.decode(parts), torch.finfo(self.dtype)
        if self.dtype == torch.float32:
            return torch.zeros_like(scales)
        return (scales * info.eps / 2 + info.smallest_normal * info.eps).where(scales > 0, 0.0)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        _check_finite_non_negative("scales", parts["scales"])


class _Double(ScaleFormat):
    """``scales``: a byte per block; ``ranges``: the (smallest, largest) positive scale of a group.

    Byte 0 is an exact zero; 1..255 run evenly from the smallest to the largest. A group of zeros
    has the range (0, 0). Costs 8.25 bits a block.
    """

    def parts(self, blocks: int) -> dict[str, Spec]:
        return {
            "scales": (torch.uint8, (blocks,)),
            "ranges": (torch.float32, (-(-blocks // _GROUP), 2)),
        }

    def encode(self, absmax: Tensor) -> dict[str, Tensor]:
        blocks = absmax.numel()
        padded = torch.nn.functional.pad(absmax, (0, -blocks % _GROUP)).view(-1, _GROUP)
        positive = padded > 0
        high = padded.amax(1, keepdim=True)
        low = padded.where(positive, high).amin(1, keepdim=True)
        span = (high - low).where(high > low, 1.0)
        codes = ((padded - low) / span * 254).round() + 1
        codes = codes.where(positive, 0).to(torch.uint8).view(-1)
        return {"scales": codes[:blocks].clone(), "ranges": torch.cat([low, high], dim=1)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["scales"]
        ranges = parts["ranges"].repeat_interleave(_GROUP, dim=0)[: codes.numel()]
        low, high = ranges.unbind(1)
        scales = torch.minimum(low + (high - low) * ((codes.float() - 1) / 254), high)
        return scales.where(codes > 0, 0.0)

    def slack(self, parts: Mapping[str, Tensor]) -> Tensor:
        low, high = parts["ranges"].unbind(1)
        half = (high - low) / (2 * 254) + high * 2.0**-20  # half a step, and float32's own rounding
        each = half.repeat_interleave(_GROUP)[: parts["scales"].numel()]
        return each.where(parts["scales"] > 0, 0.0)

    def check(self, parts: Mapping[str, Tensor]) -> None:
        _check_finite_non_negative("ranges", parts["ranges"])
        if (parts["ranges"][:, 0] > parts["ranges"][:, 1]).any():
            raise ValueError("part 'ranges' holds a smallest scale above its largest")


FORMATS: dict[Scale, ScaleFormat] = {
    "fp32": _Plain(torch.float32),
    "fp16": _Plain(torch.float16),
    "double": _Double(),
}
"""The storage formats by name."""


def _check_finite_non_negative(name: str, values: Tensor) -> None:
    if not (values.isfinite() & (values >= 0)).all():
        raise ValueError(f"part {name!r} holds values that are negative, infinite or not a number")
