"""Blockwise quantization of a tensor, and the packed result.

A tensor is flattened row-major and cut in blocks; c = max|block| is stored in a scale format, every
weight becomes the code of a level near w / c, and the codes are packed without padding. FedLPP
(arXiv 2406.10976) broadcasts LoRA factors this way; the scheme is that of QLoRA (arXiv 2305.14314).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fedlpp_ray.quantization.codebooks import Bits, Kind, check_codebook
from fedlpp_ray.quantization.memory import empty
from fedlpp_ray.quantization.packing import pack, packed_bytes, unpack
from fedlpp_ray.quantization.rounding import Levels, uniform
from fedlpp_ray.quantization.scales import FORMATS, Scale, Spec

Rounding = Literal["nearest", "stochastic"]
"""How a weight between two levels chooses one."""

Choice = Callable[[Tensor, slice, slice], Tensor]
"""From normalised weights s, ``(blocks, block)``, with the slices of weights and of blocks that
they are, to their codes, ``(n,)`` or of the shape of s."""

_CHUNK_CPU, _CHUNK_OTHER = 1 << 17, 1 << 24
"""Weights worked on at a time: on a CPU so many that the temporaries stay in a core's cache."""


@dataclass(frozen=True)
class Quantizer:
    """What quantization to apply.

    Attributes:
        bits, kind: the codebook, see :func:`fedlpp_ray.quantization.codebook`.
        block: weights that share a scale, 8 to 65536.
        scale: storage of the scales: ``"fp32"``; ``"fp16"`` (blocks above 65504 are refused, below
            6e-8 they take 6e-8); ``"double"``: 8 bits a block and 8 bytes for every 256 blocks.
        rounding: ``"nearest"``, the first level winning a tie; or ``"stochastic"``, unbiased
            between the two neighbouring levels (``"lloyd-max"`` has none beyond its outermost
            levels and ``"fp16"`` and ``"double"`` scales may be too small: there it clamps).

    Raises ``ValueError`` at construction for anything else.

    """

    bits: Bits
    kind: Kind = "nf"
    block: int = 64
    scale: Scale = "fp32"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_codebook(self.bits, self.kind, self.block)
        for name, value, allowed in (
            ("scale", self.scale, get_args(Scale)),
            ("rounding", self.rounding, get_args(Rounding)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def quantize(
        self, tensor: Tensor, generator: torch.Generator | None = None
    ) -> "QuantizedTensor":
        """Quantize a floating-point tensor of any shape; the result is on its device.

        The arithmetic is float32: s = w * (1 / c), as in bitsandbytes (float64 is rounded first).
        A block of zeros takes the code of the level nearest 0 and comes back as exact zeros.

        ``generator`` draws for stochastic rounding, and is needed for it; a CPU generator gives the
        same draws on every device.

        Raises ``TypeError`` for a non-floating dtype; ``ValueError`` for NaN, infinite or beyond
        float32 values, for a scale beyond its format, or for a missing generator.
        """
        if not tensor.is_floating_point():
            raise TypeError(f"only floating-point tensors can be quantized, got {tensor.dtype}")
        if self.rounding == "stochastic" and generator is None:
            raise ValueError("stochastic rounding needs a torch.Generator")
        weights = tensor.detach().reshape(-1)
        stored = FORMATS[self.scale].encode(self.absmax(weights))
        scales, levels = FORMATS[self.scale].decode(stored), self.levels(weights.device)
        draws = generator if self.rounding == "stochastic" else None

        def choose(s: Tensor, _: slice, blocks: slice) -> Tensor:
            if draws is None:
                return levels.nearest(s.view(-1))
            return levels.stochastic(s, uniform(s, scales[blocks], draws))

        return self.packed(tensor, self.codes(weights, scales, choose), stored)

    def packed(
        self, tensor: Tensor, codes: Tensor, stored: Mapping[str, Tensor]
    ) -> "QuantizedTensor":
        """The codes ``(n,)`` and stored scales of a tensor as one."""
        parts = {"codes": pack(codes, self.levels(tensor.device).values.numel()), **stored}
        return QuantizedTensor(self, tuple(tensor.shape), tensor.dtype, parts)

    def parts(self, shape: Sequence[int]) -> dict[str, Spec]:
        """Return name -> (dtype, shape) of the tensors that store a tensor of ``shape``."""
        numel = math.prod(shape)
        size = packed_bytes(numel, self.levels().values.numel())
        scales = FORMATS[self.scale].parts(-(-numel // self.block))
        return {"codes": (torch.uint8, (size,)), **scales}

    def levels(self, device: torch.device | None = None) -> Levels:
        """Return the codebook on ``device`` (default: the CPU)."""
        return Levels.of(self.bits, self.kind, self.block, device or torch.device("cpu"))

    def runs(self, numel: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
        """Cut ``numel`` weights in runs of equal blocks: (slice of weights, slice of blocks).

        Runs are as long as suits the device; a short last block is a run of its own.
        """
        block, whole = self.block, numel // self.block
        step = max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_OTHER) // block)
        for first in range(0, whole, step):
            last = min(first + step, whole)
            yield slice(first * block, last * block), slice(first, last)
        if numel % block:
            yield slice(whole * block, numel), slice(whole, whole + 1)

    def absmax(self, weights: Tensor) -> Tensor:
        """The largest magnitude of every block, float32 ``(blocks,)``; refuses the not finite."""
        absmax = weights.new_empty(-(-weights.numel() // self.block), dtype=torch.float32)
        for run, blocks in self.runs(weights.numel(), weights.device):
            rows = weights[run].float().view(absmax[blocks].numel(), -1)
            absmax[blocks] = rows.abs().amax(1)
        if not absmax.isfinite().all():
            raise ValueError("the tensor holds NaN, infinite, or beyond float32 values")
        return absmax

    def codes(self, weights: Tensor, scales: Tensor, choose: Choice) -> Tensor:
        """The codes ``(n,)``, uint8 or int16, that are chosen for s = w / c, clamped to [-1, 1].

        ``scales`` are the blocks' decoded c, float32; s is 0 where c is 0.
        """
        levels = self.levels(weights.device)
        codes = torch.empty_like(weights, dtype=levels.code_dtype)
        # 1 / c overflows for a subnormal c: lift such blocks first, exactly, by a power of two
        subnormal = scales < torch.finfo(torch.float32).tiny
        lift = torch.ones_like(scales).masked_fill_(subnormal, 2.0**64)
        inverse = (1 / (scales * lift)).where(scales > 0, 0.0)
        lifted = bool((subnormal & (scales > 0)).any())
        for run, blocks in self.runs(weights.numel(), weights.device):
            rows = weights[run].float().view(inverse[blocks].numel(), -1)
            if lifted:
                rows = rows * lift[blocks, None]
            s = (rows * inverse[blocks, None]).clamp_(-1, 1)
            codes[run] = choose(s, run, blocks).view(-1)
        return codes


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized tensor: made by :meth:`Quantizer.quantize`, or from received parts.

    Attributes:
        quantizer: what it was quantized with.
        shape, dtype: of the original tensor.
        parts: the packed codes (``"codes"``, uint8) and the stored scales, by name.

    """

    quantizer: Quantizer
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @classmethod
    def from_parts(
        cls,
        quantizer: Quantizer,
        shape: Sequence[int],
        dtype: torch.dtype,
        parts: Mapping[str, Tensor],
    ) -> "QuantizedTensor":
        """Rebuild from tensors that came from elsewhere: the inverse of :meth:`tensors`.

        Raises ``ValueError`` unless names, dtypes, sizes and device agree with
        ``quantizer.parts(shape)``, the scales are finite and not negative, and every code is a
        level's.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"shape must hold non-negative integers, got {tuple(shape)}")
        _check_layout(parts, quantizer.parts(shape))
        FORMATS[quantizer.scale].check(parts)
        tensor = cls(quantizer, tuple(shape), dtype, dict(parts))
        codes, count = tensor.codes(), quantizer.levels().values.numel()
        if codes.numel() and int(codes.max()) >= count:
            raise ValueError(f"part 'codes' holds a code outside the {count} levels")
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts to serialise, by name; not copies."""
        return dict(self.parts)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return scale * level, of the original shape, in ``dtype`` (default: the original's).

        The product is taken in float32 and rounded once to ``dtype``, a floating-point type; what
        exceeds its range becomes infinite.
        """
        codes, scales = self.codes(), self.scales()
        levels = self.quantizer.levels(codes.device)
        values = empty(self.numel, dtype or self.dtype, codes.device)
        for run, blocks in self.quantizer.runs(self.numel, codes.device):
            scale = scales[blocks, None]
            rows = levels.look_up(codes[run]).view(len(scale), -1)
            torch.mul(rows, scale, out=values[run].view_as(rows))
        return values.view(self.shape)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest weight that rounds to each code, fp32, the original shape.

        Between the midpoints to the neighbouring levels, times the block's scale; the outermost
        cells end at plus and minus the scale. Of rounding to nearest only; a scale that is rounded
        itself (``"fp16"``, ``"double"``) moves the bounds by as much.

        Raises ``ValueError`` for stochastic rounding.
        """
        if self.quantizer.rounding != "nearest":
            raise ValueError("stochastic rounding has no cells")
        low, high = self.quantizer.levels(self.parts["codes"].device).cells()
        each = self.scales().repeat_interleave(self.quantizer.block)[: self.numel]
        codes = self.codes().long()
        return (low[codes] * each).view(self.shape), (high[codes] * each).view(self.shape)

    def codes(self) -> Tensor:
        """The unpacked codes, ``(numel,)``."""
        return unpack(self.parts["codes"], self.quantizer.levels().values.numel(), self.numel)

    def scales(self) -> Tensor:
        """The decoded scale of every block, float32 ``(blocks,)``."""
        return FORMATS[self.quantizer.scale].decode(self.parts)


def _check_layout(parts: Mapping[str, Tensor], expected: Mapping[str, Spec]) -> None:
    if set(parts) != set(expected):
        raise ValueError(f"parts must be {sorted(expected)}, got {sorted(parts)}")
    for name, (dtype, shape) in expected.items():
        part = parts[name]
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(
                f"part {name!r} must be {dtype} of shape {shape}, "
                f"got {part.dtype} of shape {tuple(part.shape)}"
            )
    if len({part.device for part in parts.values()}) > 1:
        raise ValueError("all parts must be on one device")
