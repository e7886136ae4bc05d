"""Frozen linear layers in fp32 by oneDNN's kernels, on processors where torch's own are slow.

On a CPU torch multiplies fp32 matrices with MKL, which on AMD's processors with AVX-512 runs at
less than half of the speed of oneDNN, which torch brings too (`benchmarks.arithmetic` has both).
Both compute in fp32: relative errors were 2e-7 and 6e-7 at most, for sums of 384 to 1536 terms.
The choice depends on the processor and on shapes alone, never on timing, so runs repeat their bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

LEAST_ROWS, MOST_ROWS = 8, 1024
"""Products with fewer rows are MKL's, which start sooner; those with more are split."""
STEP, STEPPED = 8, 128
"""Up to `STEPPED` rows are filled up with zeros to a multiple of `STEP`."""


class FrozenLinear(nn.Linear):
    """`nn.Linear`; while neither weight nor bias is trained, `product` computes it.

    Also one that is spread over ranks: torch's own function keeps for its backward pass the tensor
    that was gathered, and with all of them the whole model; this one has it gathered again.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: (..., in_features) to (..., out_features)."""
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        spread = hasattr(self.weight, "ds_id")
        if trained or not (spread or _suits(input, self.weight)):
            return super().forward(input)
        return _Frozen.apply(input, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


def use_frozen_linears(model: nn.Module) -> None:
    """Make every `nn.Linear` in a model a `FrozenLinear`, in place; no tensor moves.

    Layers of other classes, such as quantized ones, are left alone.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x, for callers that compute the gradient themselves.

    Args:
        x: Shape (..., in).
        weight: Shape (out, in).
        bias: Shape (out,).
    """
    if not _suits(x, weight):
        return functional.linear(x, weight, bias)
    flat = x.reshape(-1, weight.shape[1])
    parts = [_piece(part, weight, bias) for part in torch.split(flat, _sizes(len(flat)))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)


def _sizes(rows: int) -> list[int]:
    """Powers of two that sum to `rows`, the last one being what is left, at most `STEPPED`.

    oneDNN keeps the code that it makes for a shape: 3.4 GB after two layers of 384 x 1536, forward
    and backward, had seen 1000 numbers of rows. Texts come in every length, so it gets few numbers.
    """
    sizes = []
    while rows > STEPPED:
        sizes.append(min(MOST_ROWS, 1 << (rows.bit_length() - 1)))
        rows -= sizes[-1]
    return [*sizes, rows] if rows else sizes


def _piece(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = len(x)
    if rows % STEP:
        x = functional.pad(x, (0, 0, 0, -rows % STEP))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:rows]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t()), None, None


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        prefers_onednn()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= LEAST_ROWS * weight.shape[1] > 0
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not torch.is_autocast_enabled("cpu")
    )


def has_onednn() -> bool:
    """Whether torch was built with the kernel; it is one that torch calls private."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def prefers_onednn() -> bool:
    """Whether this is a processor on which oneDNN was measured to be faster, and torch has it."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    found = {} if ask is None else ask()
    measured = str(found.get("cpu_name", "")).startswith("AMD") and bool(found.get("avx512_f"))
    return measured and has_onednn()
