"""Gradient inversion of LoRA: which tokens a step was made of, read off the span of its gradient.

An adapted layer computes h_t = W0 x_t + s B A x_t for the tokens t of a batch. With g_t = dL/dh_t,

    dL/dA = s sum_t (B^T g_t) x_t^T  (r, d_in)      rows lie in the span of the x_t
    dL/dB = s sum_t g_t (A x_t)^T    (d_out, r)     rows lie in the span of the A x_t

x_t of the first adapted layer is a function of one token (and its position) alone, so that a server
can compute it for the whole vocabulary and ask of each whether it lies in the span: DAGER's check
(Petrov et al., arXiv 2405.15586), there for whole weights. What LoRA changes:

- dA has rank r at most. With T different inputs, T <= r, its rows span them and each is found; with
  T > r they span a part of that space in which, in general, no single input lies, though all lean
  towards it. Matrices that read the same input count together: with q and v adapted, 2 r.
- With B = 0, as in the first round, dA = 0 and says nothing. dB then says all there is: A x_t in r
  dimensions, so that with T >= r the span is everything and every token passes.

The check needs the gradient. SGD's first step is one, scaled (`gradient_of_step`). AdamW's first
step has the gradient's signs alone: its magnitudes cancel, and with them the span. So does rounding
on the uplink. Dropout before the layer, which the server does not know, changes the inputs. A clip
hides nothing: by how much it shortened a step is told by the step (`clip_factor`).

That no token passes is not that none is known. Candidates ranked by their distance can give away
all that the check does not: read `informed` and `auc` before `recall`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlpp_ray.privacy.membership import PrivacyError, measure_scores
from fedlpp_ray.state import State

RANK_TOLERANCE = 1e-6
"""A singular value up to this share of the largest is taken for the rounding of fp32 products."""
_FP32 = 2.0**-24
"""Largest error of rounding to fp32, as a share of the number."""
SPAN_TOLERANCE = 5e-2
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


@dataclass(frozen=True)
class Gradient:
    """A gradient as an attacker has it.

    Attributes:
        values: (rows, width) fp64.
        noise: Standard deviation of the error of each entry, as far as it is known.
    """

    values: Tensor
    noise: float = 0.0

    @property
    def floor(self) -> float:
        """Singular values up to this are rounding or noise.

        Of independent errors the largest is noise (sqrt(rows) + sqrt(width)) at most, in
        expectation (Davidson and Szarek, 2001).
        """
        edge = self.noise * sum(math.sqrt(side) for side in self.values.shape)
        return max(edge, RANK_TOLERANCE * float(torch.linalg.matrix_norm(self.values, 2)))


Optimizer = Literal["sgd", "adamw"]


def gradient_of_step(
    update: Tensor,
    received: Tensor,
    *,
    lr: float,
    weight_decay: float,
    optimizer: Optimizer = "sgd",
    factor: float = 1.0,
    error: float = 0.0,
    noise: float = 0.0,
) -> Gradient:
    """The gradient that one first step of an optimizer was made of; of AdamW, its signs.

        SGD      u = -f lr (g + weight_decay w)
        AdamW    u = -f lr (g / (|g| + 1e-8) + weight_decay w)

    With AdamW's moments of one gradient m / sqrt(v) = sign(g) wherever |g| is well above its
    epsilon, whatever |g| is: the scale of each entry is lost.

    Args:
        update: u, what the step added, shortened by a clip. It is known up to `error` and `noise`,
            and up to the rounding of w + u to fp32, of which it is a difference: all are in the
            result's noise.
        received: w, of the same shape, what it began from.
        lr: Learning rate of that step.
        weight_decay: Of the optimizer.
        optimizer: Which.
        factor: f, 1 where nothing was clipped (`clip_factor`).
        error: Root mean square of what the uplink's rounding changes, as a share of that of u.
        noise: Standard deviation of what was added to each entry of u.

    Returns:
        g in the shape of the update; with AdamW -1, 0 or 1, and no noise.

    Raises:
        PrivacyError: the update is not finite.
    """
    _check_finite(update)
    u, w = update.double(), received.double()
    found = -u / (factor * lr) - weight_decay * w
    if optimizer == "adamw":
        return Gradient(found.round().clamp(-1, 1))
    return Gradient(found, _unknown(u, w, factor, error, noise) / (factor * lr))


def clip_factor(
    update: State,
    received: State,
    *,
    lr: float,
    weight_decay: float,
    optimizer: Optimizer = "sgd",
    error: float = 0.0,
    noise: float = 0.0,
) -> float:
    """f, by which a clip shortened one first step, found from that step alone.

    Of AdamW: |u| = f lr |1 -+ weight_decay w| in every entry with a gradient well above the
    optimizer's epsilon; f is the median of the ratios above half of the largest.

    Of SGD: -u / lr = f (g + weight_decay w). Some v has v^T g = 0 where a matrix's gradient has not
    full rank: of a batch of few inputs, and always of a classifier's head, whose rows add up to 0.
    So v is a left eigenvector of (-u / lr) w^+, f weight_decay its eigenvalue, and v^T (-u / lr -
    f weight_decay w) is 0 in all of its many columns, up to errors: an f that passes this is right.
    A matrix whose decay is within its errors says nothing, and needs no f.

    Args:
        update: u, all of it: a clip is of all tensors together.
        received: w.
        lr, weight_decay, optimizer, error, noise: As of `gradient_of_step`.

    Returns:
        In (0, 1]. Of SGD 1 where f changes no more than the scale: without weight decay, or where
        that is within the errors.

    Raises:
        PrivacyError: the update is not finite; or of SGD, no matrix tells.
    """
    for u in update.values():
        _check_finite(u)
    pairs = [(u.double(), received[name].double()) for name, u in update.items()]
    if optimizer == "adamw":
        return _common_step(pairs, lr, weight_decay)
    found, matters = [(math.inf, 1.0)], False
    for u, w in pairs:
        unknown = _unknown(u, w, 1.0, error, noise)
        if u.ndim == 2 and weight_decay * _rms(w) * lr > unknown:
            matters = True
            found += _candidates(Gradient(-u / lr, unknown / lr), w, weight_decay)
    if not matters:
        return 1.0
    left, factor = min(found)
    if left > 1:
        raise PrivacyError(
            "inversion: dp.clip with client.weight_decay: no gradient of less than full rank tells "
            "by how much the clip shortened the decay; allowed: client.weight_decay 0"
        )
    return factor


def _common_step(pairs: Sequence[tuple[Tensor, Tensor]], lr: float, weight_decay: float) -> float:
    """f of a first step of AdamW; 1 of one that is zero."""
    ratios = torch.cat(
        [(u / lr / (1 - u.sign() * weight_decay * w)).abs().flatten() for u, w in pairs]
    )
    large = ratios[ratios > ratios.max() / 2]
    return min(1.0, float(large.median())) if len(large) else 1.0


def _candidates(step: Gradient, w: Tensor, weight_decay: float) -> list[tuple[float, float]]:
    """Of a matrix's v: what f leaves of v^T (-u / lr), in units of its errors, and f."""
    x = step.values
    if len(x) > x.shape[1]:
        x, w = x.T, w.T
    values = torch.linalg.svdvals(w)
    if len(x) == x.shape[1] or not values[-1] > RANK_TOLERANCE * values[0]:
        return []
    found, vectors = torch.linalg.eig((x @ torch.linalg.pinv(w)).T)
    factors = (found.real / weight_decay).clamp(max=1)
    rows = (vectors.T @ x.to(vectors)) - (factors * weight_decay)[:, None] * (
        vectors.T @ w.to(vectors)
    )
    left = rows.norm(dim=1) / step.floor
    return [pair for pair in zip(left.tolist(), factors.tolist(), strict=True) if pair[1] > 0]


def _check_finite(update: Tensor) -> None:
    if not update.isfinite().all():
        raise PrivacyError("inversion: the update is not finite; the training has diverged")


def _unknown(u: Tensor, w: Tensor, factor: float, error: float, noise: float) -> float:
    """Root mean square of what is not known of u: rounding to fp32 and on the uplink, noise."""
    return math.hypot(factor * _FP32 * _rms(w), error * _rms(u), noise)


def row_space(gradients: Sequence[Gradient]) -> Tensor:
    """An orthonormal basis of what the rows of some matrices span, up to rounding and noise.

    Each is brought to a floor of 1, lest one layer's be taken for another's rounding.

    Args:
        gradients: Of one width.

    Returns:
        (rank, width) fp64; rank 0 of gradients that are zero.
    """
    stacked = torch.cat([g.values.double() / (g.floor or 1.0) for g in gradients])
    _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
    found: Tensor = vectors[values > len(gradients) ** 0.5]
    return found


def span_distances(basis: Tensor, inputs: Tensor) -> Tensor:
    """How much of each input lies outside a span: |x - V^T V x| / |x|.

    Args:
        basis: V (rank, width), orthonormal rows.
        inputs: (..., width).

    Returns:
        (...) fp64 in [0, 1]: 0 in the span, which that of as many rows as columns always is; 1
        orthogonal to it or, of an input that is 0, unknown.
    """
    if len(basis) == basis.shape[1]:
        return torch.zeros(inputs.shape[:-1], dtype=torch.float64)
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


def spans_of_a(gradients: Sequence[Gradient]) -> list[Span]:
    """The one span of the inputs, from dL/dA (r, d_in) of all layers that read the same ones."""
    rows, width = sum(len(g.values) for g in gradients), gradients[0].values.shape[1]
    return [Span(row_space(gradients), min(rows, width))]


def spans_of_b(gradients: Sequence[Gradient], factors: Sequence[Tensor]) -> list[Span]:
    """A span of A x for each layer, from its dL/dB (d_out, r) and A (r, d_in)."""
    pairs = zip(gradients, factors, strict=True)
    return [Span(row_space([g]), min(g.values.shape), projection=a) for g, a in pairs]


def token_distances(spans: Sequence[Span], inputs: Tensor) -> Tensor:
    """(tokens,) each token's distance to the nearest span, at the position where that is least.

    A span that is everything tells nothing, and counts only where all are. Any other need not have
    all of a batch's inputs: where a layer's gradients are small, rounding takes some of them.

    Args:
        spans: Of one batch's inputs.
        inputs: (tokens, positions, d_in) each token's input to the layer at each position.
    """
    telling = [span for span in spans if len(span.basis) < span.basis.shape[1]] or spans
    found = torch.stack([span.distances(inputs) for span in telling])
    return found.amin(0).amin(1)


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


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _nearest(distances: Tensor, flags: Tensor, count: int) -> float:
    """The share of the flagged among the `count` nearest, in expectation over orders of ties."""
    last = distances.sort().values[count - 1]
    nearer, tied = distances < last, distances == last
    drawn = (count - int(nearer.sum())) / int(tied.sum())
    return float(((nearer & flags).sum() + drawn * (tied & flags).sum()) / count)
