"""Gradient inversion of LoRA: which tokens a step was made of, read off the span of its gradient.

An adapted layer computes h_t = W0 x_t + s B A x_t for the tokens t of a batch. With g_t = dL/dh_t,

    dL/dA = s sum_t (B^T g_t) x_t^T  (r, d_in)      rows lie in the span of the x_t
    dL/dB = s sum_t g_t (A x_t)^T    (d_out, r)     rows lie in the span of the A x_t

x_t of the first adapted layer is a function of one token (and its position) alone, so that a server
can compute it for the whole vocabulary and ask of each whether it lies in the span: DAGER's check
(Petrov et al., arXiv 2405.15586), there for whole weights. What LoRA changes:

- dA has rank r at most. With T different inputs, T <= r, its rows span them and each is found; with
  T > r they span a part of that space in which, in general, no single input lies. Matrices that
  read the same input count together: with q and v adapted, the limit is 2 r.
- With B = 0, as in the first round, dA = 0 and says nothing. dB then says all there is: A x_t in r
  dimensions, so that with T >= r the span is everything and every token passes.

The check needs the gradient. SGD's first step is one, scaled (`gradient_of_step`). AdamW's first
step has the gradient's signs alone: its magnitudes cancel, and with them the span. Dropout before
the layer, which the server does not know, changes the inputs and defeats the check too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlpp_ray.privacy.membership import PrivacyError, measure_scores

RANK_TOLERANCE = 1e-3
"""A singular value below this share of the largest is taken for rounding: an update in fp32 is the
difference of two states, so that the gradient in it has errors far above fp32's own."""
SPAN_TOLERANCE = 1e-2
"""An input whose part outside the span has at most this share of its length is taken for one in
it."""


@dataclass(frozen=True)
class Inversion:
    """What a span check finds of a batch's tokens.

    Attributes:
        tokens: Different tokens in the batch.
        candidates: Tokens that were tried.
        accepted: Of these, how many lie in the span.
        precision: Share of the accepted ones that are in the batch; None where none is accepted.
        recall: Share of the batch's tokens that are accepted.
        informed: Share of the batch's tokens among as many nearest candidates: what is found by who
            knows how many to take and needs no threshold; ties count as a random order would.
        auc: Probability that a token of the batch is nearer to the span than another, ties counting
            half. 0.5: the span tells nothing.
        rank: Numerical rank of the gradient.
        full_rank: The rank that it cannot be above. If equal, the batch may have had more inputs.
    """

    tokens: int
    candidates: int
    accepted: int
    precision: float | None
    recall: float
    informed: float
    auc: float
    rank: int
    full_rank: int


def gradient_of_step(
    update: Tensor,
    received: Tensor,
    *,
    lr: float,
    weight_decay: float,
    optimizer: Literal["sgd", "adamw"] = "sgd",
) -> Tensor:
    """The gradient that one first step of an optimizer was made of; of AdamW, its signs.

        SGD      u = -lr (g + weight_decay w)
        AdamW    u = -lr (g / (|g| + 1e-8) + weight_decay w)

    With AdamW's moments of one gradient m / sqrt(v) = sign(g) wherever |g| is well above its
    epsilon, whatever |g| is: the scale of each entry is lost.

    Args:
        update: u, what the step added.
        received: w, of the same shape, what it began from.
        lr: Learning rate of that step.
        weight_decay: Of the optimizer.
        optimizer: Which.

    Returns:
        g in the shape of the update; with AdamW -1, 0 or 1.
    """
    found = -update.double() / lr - weight_decay * received.double()
    return found.round().clamp(-1, 1) if optimizer == "adamw" else found


def row_space(gradient: Tensor, tolerance: float = RANK_TOLERANCE) -> Tensor:
    """An orthonormal basis of what the rows span, up to rounding.

    Args:
        gradient: (rows, width).
        tolerance: Singular values up to this share of the largest count as 0.

    Returns:
        (rank, width) fp64; rank 0 of a gradient that is zero.

    Raises:
        PrivacyError: the gradient is not finite.
    """
    if not gradient.isfinite().all():
        raise PrivacyError("inversion: the update is not finite; the training has diverged")
    _, values, vectors = torch.linalg.svd(gradient.double(), full_matrices=False)
    found: Tensor = vectors[values > tolerance * values.max()]
    return found


def span_distances(basis: Tensor, inputs: Tensor) -> Tensor:
    """How much of each input lies outside a span: |x - V^T V x| / |x|.

    Args:
        basis: V (rank, width), orthonormal rows.
        inputs: (..., width).

    Returns:
        (...) fp64 in [0, 1]: 0 in the span, 1 orthogonal to it or, of an input that is 0, unknown.
    """
    inputs = inputs.double()
    outside = inputs - (inputs @ basis.T) @ basis
    length = inputs.norm(dim=-1)
    return torch.where(length > 0, outside.norm(dim=-1) / length, 1.0).clamp(max=1.0)


@dataclass(frozen=True)
class Span:
    """One span to hold candidates against.

    Attributes:
        basis: (rank, width) of `row_space`.
        full_rank: The rank that it cannot be above: the smaller side of the gradient.
        projection: A (r, d_in) where the span is that of A x; None where it is that of x.
    """

    basis: Tensor
    full_rank: int
    projection: Tensor | None = None

    def distances(self, inputs: Tensor) -> Tensor:
        """As `span_distances`, of a layer's inputs (..., d_in)."""
        if self.projection is not None:
            inputs = inputs.double() @ self.projection.double().T
        return span_distances(self.basis, inputs)


def spans_of_a(gradients: Sequence[Tensor]) -> list[Span]:
    """The one span of the inputs, from dL/dA (r, d_in) of all layers that read the same ones.

    Each is brought to norm 1, lest one layer's be taken for another's rounding.
    """
    scaled = [g.double() / (g.double().norm() or 1.0) for g in gradients]
    stacked = torch.cat(scaled)
    return [Span(row_space(stacked), min(stacked.shape))]


def spans_of_b(gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Span]:
    """A span of A x for each layer, from its dL/dB (d_out, r) and A (r, d_in).

    An input is in the batch only if it passes in all of them.
    """
    pairs = zip(gradients, factors, strict=True)
    return [Span(row_space(g), min(g.shape), projection=a) for g, a in pairs]


def token_distances(spans: Sequence[Span], inputs: Tensor) -> Tensor:
    """(tokens,) the farthest of a token's distances, at the position where that is least.

    Args:
        spans: In all of which an input has to lie.
        inputs: (tokens, positions, d_in) each token's input to the layer at each position.
    """
    found = torch.stack([span.distances(inputs) for span in spans])
    return found.amax(0).amin(1)


def measure_inversion(
    spans: Sequence[Span],
    distances: Tensor,
    present: Collection[int],
    tolerance: float = SPAN_TOLERANCE,
) -> Inversion:
    """What candidates at these distances give away of the tokens that were present.

    Args:
        spans: Which the distances are to; their ranks are added up.
        distances: (candidates,) of token 0, 1, ... as `token_distances` returns them.
        present: The tokens of the batch.
        tolerance: Largest distance that is accepted.

    Raises:
        PrivacyError: the batch has no token, or all candidates.
    """
    flags = torch.zeros(len(distances), dtype=torch.bool)
    flags[list(present)] = True
    accepted, count = distances <= tolerance, int(flags.sum())
    hits = int((accepted & flags).sum())
    ranked = measure_scores(-distances[flags].numpy(), -distances[~flags].numpy())
    return Inversion(
        tokens=count,
        candidates=len(distances),
        accepted=int(accepted.sum()),
        precision=hits / int(accepted.sum()) if accepted.any() else None,
        recall=hits / count,
        informed=_nearest(distances, flags, count),
        auc=ranked.auc,
        rank=sum(len(span.basis) for span in spans),
        full_rank=sum(span.full_rank for span in spans),
    )


def _nearest(distances: Tensor, flags: Tensor, count: int) -> float:
    """The share of the flagged among the `count` nearest, in expectation over orders of ties."""
    last = distances.sort().values[count - 1]
    nearer, tied = distances < last, distances == last
    drawn = (count - int(nearer.sum())) / int(tied.sum())
    return float(((nearer & flags).sum() + drawn * (tied & flags).sum()) / count)
