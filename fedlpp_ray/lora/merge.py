"""A model without its adapter's branches, for as long as it is only read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.lora.state import ADAPTER
from fedlpp_ray.models import FrozenLinear, PackedLinear, is_sharded
from fedlpp_ray.models.linear import product

_BASES = (nn.Linear, FrozenLinear, Conv1D, PackedLinear)


@contextmanager
def merged(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside the block, an adapted layer is one product with W0 + (alpha/r) (B A + E).

    The sum is taken in fp32 and rounded once to `dtype`. It is a tensor of its own: W0 and the
    adapter are not written to, and after the block the model has its own layers again, bit for bit.
    A layer of bitsandbytes keeps its branch. One that is spread over ranks is merged whenever it is
    called, which is when it is whole.

    Packed layers are dequantized too, on a CPU those without an adapter as well: once instead of
    in each forward, which decoding calls once a token. That takes, for as long as the block, the
    memory of the dense weights that are replaced: on a CPU no more than the base took when it was
    loaded. On a GPU, where packing is to save memory, only adapted layers are dequantized.

    Args:
        model: In evaluation mode, with adapters of any kind or none.
        dtype: Of the merged and dequantized weights.
    """
    with torch.no_grad():
        substitutes = _substitutes(model, dtype)
    places = [  # a layer may have several
        (parent, name, layer)
        for parent in list(model.modules())
        for name, layer in parent._modules.items()
        if layer in substitutes
    ]
    for parent, name, layer in places:
        parent._modules[name] = substitutes[layer]
    try:
        yield
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer
            substitutes[layer].__dict__.pop("forward", None)


def _substitutes(model: nn.Module, dtype: torch.dtype) -> dict[nn.Module, nn.Module]:
    """A layer without branches for each that is merged or dequantized."""
    adapted, found = _adapted(model), dict[nn.Module, nn.Module]()
    for layer, base in adapted.items():
        if is_sharded(base):  # its own hooks make it whole, so it is called itself
            base.forward = partial(_merged_forward, layer, base, dtype)
            found[layer] = base
        else:
            found[layer] = _linear(_merge(layer, base, dtype), base)
    for layer in set(model.modules()).difference(adapted.values()):
        if type(layer) is not PackedLinear or is_sharded(layer):
            continue
        if layer.weight.device.type == "cpu":
            found[layer] = _linear(layer.packed.dequantize(dtype), layer)
    return found


def _merged_forward(layer: Any, base: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    return product(x, _merge(layer, base, dtype), base.bias)


def _adapted(model: nn.Module) -> dict[nn.Module, Any]:
    """The layers that are merged, and the base of each."""
    return {
        layer: layer.get_base_layer()
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and type(layer.get_base_layer()) in _BASES
    }


def adapted_numbers(model: nn.Module) -> int:
    """Weights of all layers that `merged` replaces for their adapters, of a base that is dense.

    Args:
        model: With adapters; or its outline, not quantized.
    """
    return sum(base.weight.numel() for base in _adapted(model).values())


def _merge(layer: Any, base: Any, dtype: torch.dtype) -> Tensor:
    """W0 + (alpha/r) (B A + E), (out_features, in_features)."""
    product: Tensor = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    if "residual" in layer._buffers:
        product = product + layer.residual
    product = product.mul_(layer.scaling[ADAPTER])
    if type(base) is PackedLinear:
        weight = base.packed.dequantize(torch.float32)
    else:
        weight = base.weight.t() if type(base) is Conv1D else base.weight
    return product.add_(weight).to(dtype)


def _linear(weight: Tensor, like: Any) -> nn.Linear:
    """A frozen layer of this weight, with another's bias."""
    linear = FrozenLinear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = like.bias
    return linear.eval()
