"""A linear layer whose weight is stored in the project's packed blockwise format.

The same codes and scales as on the wire (`fedlpp_ray.quantization`). PEFT sees an ordinary
`nn.Linear` and wraps it with its ordinary LoRA layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlpp_ray.models.linear import product
from fedlpp_ray.quantization import QuantizedTensor, Quantizer


class PackedLinear(nn.Linear):
    """y = x deq(Q)^T + b with Q the packed weight of shape (out_features, in_features).

    Nothing dense is kept between calls: forward and backward each dequantize once. The weight gets
    no gradient; x does. Source: QLoRA (arXiv 2305.14314), section 3.

    Args:
        linear: The layer to pack; it is not changed. Its bias is kept in full precision. Of one on
            the meta device only the shapes are made.
        quantizer: Format of the weight.
    """

    def __init__(self, linear: nn.Linear, quantizer: Quantizer) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self._template = QuantizedTensor(quantizer, tuple(weight.shape), weight.dtype, {})
        self._parts = tuple(quantizer.parts(weight.shape))
        for name, tensor in _packed(weight, quantizer).items():
            self.register_buffer(f"packed_{name}", tensor)
        self.bias = linear.bias

    @property
    def packed(self) -> QuantizedTensor:
        """The weight as it is stored."""
        parts = {name: getattr(self, f"packed_{name}") for name in self._parts}
        return replace(self._template, parts=parts)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed codes. Other libraries read this for its device only."""
        return self.packed_codes  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in_features) to (..., out_features), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _PackedMatmul.apply(x, bias, self)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """Widths and format."""
        q = self._template.quantizer
        return f"{self.in_features}, {self.out_features}, bits={q.bits}, kind={q.kind}"


def _packed(weight: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
    if not weight.is_meta:
        return quantizer.quantize(weight).tensors()
    return {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in quantizer.parts(weight.shape).items()
    }


class _PackedMatmul(torch.autograd.Function):
    """Saves the packed layer instead of a dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return product(x, layer.packed.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        needs_x, needs_bias, _ = ctx.needs_input_grad
        x = None
        if needs_x:
            x = product(gradient, ctx.layer.packed.dequantize(gradient.dtype).t())
        return x, gradient.flatten(0, -2).sum(0) if needs_bias else None, None
