"""What quantizing takes from a base, at low rank, for the party that keeps the base whole.

Adapters that were trained on the quantized base W^ are fitted to it. Who has W0 can give them that
base back: W0 + R, with R the best approximation of rank k of W^ - W0, layer by layer. LoftQ
(arXiv 2310.08659) fits the same residue, with the other sign, to start adapters from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.config import ClientConfig
from fedlpp_ray.models.base import linears, quantize_layer


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right of shape (out, in).

    Attributes:
        left: (out, k), fp32; its columns are orthonormal where out <= in.
        right: (k, in), fp32; its rows are orthonormal elsewhere.
    """

    left: Tensor
    right: Tensor


def best_of_rank(matrix: Tensor, rank: int) -> LowRank:
    """The approximation of a rank that is best in the Frobenius norm (Eckart and Young, 1936).

    It is the projection on the eigenvectors of the largest eigenvalues of the smaller Gram matrix,
    in float64: what the SVD cut at k is, at less cost.

    Args:
        matrix: (out, in).
        rank: k; min(out, in) and more give the matrix itself, but for rounding.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.t() if tall else matrix).double()
    basis = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:]
    rest = basis.t() @ wide
    left, right = (rest.t(), basis.t()) if tall else (basis, rest)
    return LowRank(left.float().contiguous(), right.float().contiguous())


class Correction:
    """R of every layer that a client's base has quantized: all linear ones but the head.

    Not only of layers with adapters: what any layer computes is what those after it were adapted
    to. Source: LoftQ (arXiv 2310.08659), section 3, of which R is the residue with its sign turned.

    Args:
        model: W0, frozen, on the CPU, before adapters are added; these may be added afterwards.
        config: `base_bits` and the keys beside it, of a format that can be made dense.
        rank: k, at least 1.
        whole: Names of modules that are trained whole, hence not quantized.
    """

    def __init__(
        self, model: nn.Module, config: ClientConfig, rank: int, whole: Sequence[str]
    ) -> None:
        dense = config.model_copy(update={"dequantize_at_load": True})
        self._layers: dict[str, tuple[nn.Module, LowRank]] = {}
        for name, linear in linears(model, whole).items():
            with torch.no_grad():
                quantized: Any = quantize_layer(linear, dense).weight
                residue = best_of_rank(quantized - linear.weight, rank)
            self._layers[name] = model.get_submodule(name), residue

    def fold(self) -> None:
        """Make the model W0 + R for good, in tensors of its own."""
        for layer, residue in self._layers.values():
            layer.weight = nn.Parameter(_corrected(layer, residue), requires_grad=False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model is W0 + R; after it, W0 again, bit for bit.

        It takes the memory of the layers' weights once more.
        """
        plain = [(layer, layer.weight) for layer, _ in self._layers.values()]
        self.fold()
        try:
            yield
        finally:
            for layer, weight in plain:
                layer.weight = weight

    def tensors(self) -> dict[str, Tensor]:
        """`LAYER.left` (out, k) and `LAYER.right` (k, in) of each layer: R = left @ right."""
        sides = {name: residue for name, (_, residue) in self._layers.items()}
        return {f"{name}.left": each.left for name, each in sides.items()} | {
            f"{name}.right": each.right for name, each in sides.items()
        }


def _corrected(layer: Any, residue: LowRank) -> Tensor:
    weight: Tensor = layer.weight.detach()
    added = residue.left.to(weight.device) @ residue.right.to(weight.device)
    return weight + (added.t() if isinstance(layer, Conv1D) else added)
