"""Byzantine-tolerant rules: one update out of n, of which at most f are by attackers.

They take the place of the mean of the updates u_i = K_i - D_i. An attacker may send any finite
update and know all others; the rules bound what that does. All are unweighted: an attacker says
itself how many examples it has. All count in float64, and give the same bits in any order of
arrival: clients are sorted first.

Beside the updates and the result a rule needs a fixed scratch (`_SCRATCH`), and Krum n^2 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlpp_ray.aggregation.methods.base import Method, Return
from fedlpp_ray.errors import UserError
from fedlpp_ray.state import State, schema_of

SMOOTHING = 1e-6
"""nu of the geometric median: an update nearer than that has no more say than one there."""
STEPS = 100
"""The most that the geometric median makes. Tens are enough but where it begins at an update."""
_STILL = 1e-9
"""It is there once a step is shorter than this share of the median distance."""
_SCRATCH = 2**18
"""Numbers of all updates that are looked at together."""

Combine = Callable[[Sequence[State], int], State]
"""(updates, sorted by client, and f) to one, float64."""


@dataclass(frozen=True)
class RobustRule:
    """A rule and its limit, n >= 2 f + spare.

    Attributes:
        name: As in `ROBUST`.
        spare: Of the limit.
        trims: Whether f says how much is left out; else it is in the limit alone.
        combine: What it makes of so many.
    """

    name: str
    spare: int
    trims: bool
    combine: Combine

    def fewest(self, byzantine: int) -> int:
        """n that f attackers need: the fewest updates that it takes."""
        return 2 * byzantine + self.spare

    def __call__(self, updates: Mapping[int, State], byzantine: int) -> State:
        """One update, float64, of the schema of each.

        Args:
            updates: u_i by client, all with the same names and shapes, finite.
            byzantine: f, the most of them that attackers may have sent.

        Raises:
            ValueError: f is negative, there are too few updates for it, or they do not match.
        """
        if byzantine < 0:
            raise ValueError(f"{byzantine} attackers: at least 0 are allowed")
        if len(updates) < self.fewest(byzantine):
            raise ValueError(
                f"{self.name} of {len(updates)} updates, at most {byzantine} of them by attackers: "
                f"n >= 2f + {self.spare} = {self.fewest(byzantine)} are needed"
            )
        sorted_by_client = [updates[client] for client in sorted(updates)]
        if any(schema_of(each) != schema_of(sorted_by_client[0]) for each in sorted_by_client):
            raise ValueError("the updates' names and shapes are not all the same")
        return self.combine(sorted_by_client, byzantine)


ROBUST: dict[str, RobustRule] = {}


def _register(name: str, *, spare: int, trims: bool) -> Callable[[Combine], RobustRule]:
    def register(combine: Combine) -> RobustRule:
        ROBUST[name] = RobustRule(name, spare, trims, combine)
        return ROBUST[name]

    return register


def find_robust(name: str) -> RobustRule:
    """The rule of this name.

    Raises:
        UserError: there is none.
    """
    if name not in ROBUST:
        raise UserError(f"server.robust = '{name}': allowed: none, {', '.join(ROBUST)}")
    return ROBUST[name]


def robustly(method: Method, name: str, byzantine: int) -> Method:
    """The same method with a robust rule in the place of the mean of its updates.

    Args:
        method: One that takes that mean (`Method.averages`).
        name: Of the rule.
        byzantine: f.

    Raises:
        UserError: there is no such rule.
    """
    rule = find_robust(name)

    def direction(returns: Sequence[Return], _broadcast: State) -> State:
        return rule({i: each.update for i, each in enumerate(returns)}, byzantine)

    return replace(method, direction=direction)


@_register("median", spare=1, trims=False)
def median(updates: Sequence[State], _byzantine: int) -> State:
    """Coordinate by coordinate the median (Yin et al., 2018, arXiv 1803.01498, definition 1).

    Of an even number, the mean of the two in the middle. With f < n/2 attackers every number is
    within the range of the honest ones.
    """
    return _by_block(updates, _middle)


@_register("trimmed-mean", spare=1, trims=True)
def trimmed_mean(updates: Sequence[State], byzantine: int) -> State:
    """Coordinate by coordinate the mean without extremes (Yin et al., 2018, definition 2).

    The f smallest and the f largest values are left out, and n - 2f are averaged: beta = f / n of
    the paper. With 2f < n every number is within the range of the honest ones.
    """
    kept = slice(byzantine, len(updates) - byzantine)
    return _by_block(updates, lambda rows: rows.sort(0).values[kept].mean(0))


@_register("krum", spare=3, trims=True)
def krum(updates: Sequence[State], byzantine: int) -> State:
    """The update that is nearest to its neighbours (Blanchard et al., 2017, arXiv 1703.02757).

        argmin_i s(i),  s(i) = sum of ||u_i - u_j||^2 over the n - f - 2 nearest j != i

    over all tensors together; of equal ones that of the lowest client. With n >= 2f + 3 it picks an
    attacker's only where that is among honest ones: its squared distances to the n - 2f - 1 nearest
    of these come to no more than an honest update's score.
    """
    return {name: x.double() for name, x in updates[_by_score(updates, byzantine)[0]].items()}


@_register("multi-krum", spare=3, trims=True)
def multi_krum(updates: Sequence[State], byzantine: int) -> State:
    """The mean of the n - f updates of the best Krum scores (the same paper, section 5).

    The scores are counted once. Attackers may be among them, if they are near the honest ones.
    """
    chosen = sorted(_by_score(updates, byzantine)[: len(updates) - byzantine])
    return _by_block([updates[i] for i in chosen], lambda rows: rows.mean(0))


@_register("geometric-median", spare=1, trims=False)
def geometric_median(updates: Sequence[State], _byzantine: int) -> State:
    """argmin_v sum_i ||v - u_i||, by the smoothed Weiszfeld algorithm (Pillutla et al., 2022).

        v <- sum_i b_i u_i / sum_i b_i,  b_i = 1 / max(nu, ||v - u_i||)

    RFA, arXiv 1912.13445, with equal weights; norms are over all tensors together.
    It begins at the coordinate-wise median, so that no attacker says where, and goes on until it
    stands still (the paper makes three steps). With f < n/2 attackers and honest updates within r
    of a point, v is within 2 (n - f) / (n - 2f) r of it.
    """
    found = _by_block(updates, _middle)
    for _ in range(STEPS):
        distances = _distances(updates, found)
        weights = 1 / distances.clamp(min=SMOOTHING)
        weights = (weights / weights.sum())[:, None]
        moved = 0.0
        for name, run, rows in _blocks(updates):
            current, following = found[name].view(-1)[run], (weights * rows).sum(0)
            moved += float((following - current).square().sum())
            current.copy_(following)
        if moved**0.5 <= _STILL * float(distances.median()):
            break
    return found


def _middle(rows: Tensor) -> Tensor:
    """(n, numbers) to their medians."""
    ordered, n = rows.sort(0).values, len(rows)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _by_score(updates: Sequence[State], byzantine: int) -> list[int]:
    """Places of the updates, that of the lowest Krum score first."""
    n = len(updates)
    above = torch.triu_indices(n, n, 1)
    of_pairs = torch.zeros(above.shape[1], dtype=torch.float64)
    for _, _, rows in _blocks(updates):
        of_pairs += torch.pdist(rows).square_()  # of differences: norms and products would cancel
    squares = torch.full((n, n), torch.inf, dtype=torch.float64)
    squares[above[0], above[1]] = squares[above[1], above[0]] = of_pairs
    scores = squares.sort(1).values[:, : n - byzantine - 2].sum(1).tolist()
    return sorted(range(n), key=lambda i: (scores[i], i))


def _distances(updates: Sequence[State], point: State) -> Tensor:
    """(n,) ||u_i - v|| over all tensors."""
    squares = torch.zeros(len(updates), dtype=torch.float64)
    for name, run, rows in _blocks(updates):
        squares += (rows - point[name].view(-1)[run]).square_().sum(1)
    return squares.sqrt_()


def _by_block(updates: Sequence[State], reduce: Callable[[Tensor], Tensor]) -> State:
    """A state of what (n, numbers) come to, some numbers at a time."""
    found = {n: torch.empty(x.shape, dtype=torch.float64) for n, x in updates[0].items()}
    for name, run, rows in _blocks(updates):
        found[name].view(-1)[run] = reduce(rows)
    return found


def _blocks(updates: Sequence[State]) -> Iterator[tuple[str, slice, Tensor]]:
    """A tensor's name, a run of its numbers, and (n, numbers) of these, float64."""
    step = max(1, _SCRATCH // len(updates))
    for name, first in updates[0].items():
        flat = [each[name].detach().reshape(-1) for each in updates]
        for start in range(0, first.numel(), step):
            run = slice(start, start + step)
            yield name, run, torch.stack([row[run] for row in flat]).double()
