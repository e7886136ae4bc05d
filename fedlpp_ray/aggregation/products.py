"""Products of LoRA factors without the dense matrix, and states of another rank.

A product B A of rank R is kept as its two sides. Sums of products are exact: sides are put side by
side. Singular values come from two thin QR factorisations, in O((d_out + d_in) R^2).

Clients may have a smaller rank than the server. PEFT scales a product by alpha / r, so the same
numbers mean another update at another rank. `truncate` and `pad` go between the two *keeping the
scaled product*: everything between them is in the server's units, and (alpha / r_i) B_i A_i of a
client is (alpha / R) B A of its padded state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlpp_ray.state import FACTOR_AXIS, State, layers_of, name_of, part


@dataclass(frozen=True)
class Product:
    """left @ right, float64.

    Attributes:
        left: (d_out, R).
        right: (R, d_in).
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrix, (d_out, d_in), float64."""
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_out, k), S (k,) descending, Vh (k, d_in) with k = min(R, d_out, d_in)."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u, s, vh @ q_right.T

    def times(self, right: Tensor) -> Tensor:
        """left @ (right @ x), (d_out, k), for x of (d_in, k)."""
        return self.left @ (self.right @ right)


@dataclass(frozen=True)
class Matrix:
    """A sum of products whose ranks together are no smaller than a matrix; as a `Product`.

    Attributes:
        values: (d_out, d_in), float64.
    """

    values: Tensor

    def dense(self) -> Tensor:
        """The matrix, (d_out, d_in), float64."""
        return self.values

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_out, k), S (k,) descending, Vh (k, d_in) with k = min(d_out, d_in)."""
        u, s, vh = torch.linalg.svd(self.values, full_matrices=False)
        return u, s, vh

    def times(self, right: Tensor) -> Tensor:
        """The matrix times x, (d_out, k), for x of (d_in, k)."""
        return self.values @ right


def product(state: State, layer: str) -> Product:
    """B A of one layer of a state."""
    return Product(state[name_of(layer, "B")].double(), state[name_of(layer, "A")].double())


def combine(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """sum_i w_i P_i, exactly, with the ranks added up."""
    left = torch.cat([w * p.left for p, w in zip(products, weights, strict=True)], dim=1)
    return Product(left, torch.cat([p.right for p in products]))


def norm(state: State) -> float:
    """Frobenius norm of all products of a state together."""
    grams = (product(state, layer) for layer in layers_of(state))
    # ||B A||^2 = tr((B^T B) (A A^T))
    squares = [float(((p.left.T @ p.left) * (p.right @ p.right.T)).sum()) for p in grams]
    return math.sqrt(max(0.0, sum(squares)))


def rank_of(state: State) -> int:
    """The rank of a state's factors."""
    return int(state[name_of(layers_of(state)[0], "A")].shape[0])


def truncate(state: State, rank: int) -> State:
    """The first `rank` rows of each A and columns of each B, in units of that rank.

    The scaled product is that of the kept rows and columns: factors are multiplied by sqrt(r / R).
    The head and residuals are passed on.

    Args:
        state: Factors of rank R, A and B or one of them.
        rank: r <= R. At r = R the state is returned unchanged.
    """
    return {name: _first(name, tensor, rank) for name, tensor in state.items()}


def pad(state: State, rank: int) -> State:
    """The inverse of `truncate`: zeros up to `rank`, in units of that rank."""
    return {name: _padded(name, tensor, rank) for name, tensor in state.items()}


def rotate(state: State, random: torch.Generator, *, back: bool = False) -> State:
    """(B R, R^T A) for a random rotation R of every layer: the same product B A.

    Args:
        state: Factors, or updates of them; one of a layer's two may be missing.
        random: Draws R, uniform over rotations: the same for the same layers, rank and seed.
        back: Undo it: (B R^T, R A).
    """
    turned = dict(state)
    for layer in dict.fromkeys(_LAYER.sub("", n) for n in sorted(state) if part(n) in FACTOR_AXIS):
        a, b = name_of(layer, "A"), name_of(layer, "B")
        rank = state[a].shape[0] if a in state else state[b].shape[1]
        r = _rotation(rank, random)
        r = r.T if back else r
        if a in state:
            turned[a] = (r.T @ state[a].double()).float()
        if b in state:
            turned[b] = (state[b].double() @ r).float()
    return turned


def _rotation(size: int, random: torch.Generator) -> Tensor:
    """Uniform over orthogonal matrices, float64 (Mezzadri, 2007): QR with R's diagonal positive."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


_LAYER = re.compile(r"\.lora_[AB]\.weight$")


def _first(name: str, tensor: Tensor, rank: int) -> Tensor:
    axis = FACTOR_AXIS.get(part(name))
    if axis is None or tensor.shape[axis] == rank:
        return tensor
    return tensor.narrow(axis, 0, rank) * math.sqrt(rank / tensor.shape[axis])


def _padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    axis = FACTOR_AXIS.get(part(name))
    if axis is None or tensor.shape[axis] == rank:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = rank - tensor.shape[axis]
    return torch.cat([tensor * math.sqrt(rank / tensor.shape[axis]), tensor.new_zeros(shape)], axis)
