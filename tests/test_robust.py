"""Robust rules against numbers by hand, an independent reference, and attackers at their limit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import trim_mean

from fedlpp_ray.aggregation import ROBUST, find_robust, robust
from fedlpp_ray.errors import UserError
from fedlpp_ray.state import State, state_digest

Points = NDArray[np.float64]
FAR = 1e3
"""As far as `server.max_update_norm` lets an update go."""


def states(points: Points) -> dict[int, State]:
    """(n, d >= 2) as updates of clients 0, 10, 20, ...: the first number, and a column of others.

    Clients are given the last first.
    """
    rows = torch.tensor(points, dtype=torch.float32)
    made = {10 * i: {"a": row[:1].clone(), "b": row[1:].view(-1, 1)} for i, row in enumerate(rows)}
    return dict(reversed(made.items()))


def flat(state: Mapping[str, torch.Tensor]) -> Points:
    assert {x.dtype for x in state.values()} == {torch.float64}
    return torch.cat([state["a"], state["b"].view(-1)]).numpy()


def combined(name: str, points: object, byzantine: int) -> Points:
    return flat(find_robust(name)(states(np.asarray(points)), byzantine))


FIVE = [[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [7.5, 10.0], [300.0, -400.0]]
"""The first four are 0, 5, 10 and 12.5 along a line, the last is far from all."""


@pytest.mark.parametrize(
    ("name", "points", "byzantine", "expected"),
    [
        ("median", FIVE, 2, [6.0, 4.0]),
        ("median", [[1.0, -7.0], [3.0, 5.0], [2.0, 1.0], [100.0, 2.0]], 1, [2.5, 1.5]),
        ("trimmed-mean", FIVE, 1, [5.5, 4.0]),  # of 3, 6, 7.5 and of 0, 4, 8
        ("trimmed-mean", FIVE, 2, [6.0, 4.0]),
        ("trimmed-mean", [[1.0, 2.0], [3.0, 6.0]], 0, [2.0, 4.0]),
        # Two neighbours: 25 + 100, 25 + 25, 6.25 + 25, 6.25 + 56.25, and far.
        ("krum", FIVE, 1, [6.0, 8.0]),
        ("multi-krum", FIVE, 1, [4.125, 5.5]),
        # Of equal scores, 1 + 4 of clients 10 and 20, that of the lowest client.
        ("krum", [[0.0, 9.0], [1.0, 9.0], [3.0, 9.0], [4.0, 9.0], [99.0, 9.0]], 1, [1.0, 9.0]),
        # Four corners: where the diagonals cross. The mean is (1.25, 1.25).
        ("geometric-median", [[0.0, 0.0], [3.0, 3.0], [0.0, 2.0], [2.0, 0.0]], 1, [1.0, 1.0]),
        ("geometric-median", [[1.0, 0.0], [2.0, 0.0], [50.0, 0.0]], 1, [2.0, 0.0]),
        ("geometric-median", [[2.0, 3.0], [2.0, 3.0], [2.0, 3.0]], 1, [2.0, 3.0]),
    ],
)
def test_a_rule_gives_the_numbers_counted_by_hand(
    name: str, points: list[list[float]], byzantine: int, expected: list[float]
) -> None:
    """Exactly; the geometric median, which is smoothed and found step by step, within 1e-5."""
    tolerance = 1e-5 if name == "geometric-median" else 0.0
    np.testing.assert_allclose(combined(name, points, byzantine), expected, rtol=0, atol=tolerance)


def total(points: Points, v: Points) -> float:
    """What the geometric median makes least."""
    return float(np.linalg.norm(points - v, axis=1).sum())


def reference(name: str, points: Points, byzantine: int) -> Points:
    """By numpy and scipy, of all points at once."""
    n = len(points)
    if name == "median":
        return np.asarray(np.median(points, axis=0))
    if name == "trimmed-mean":
        return np.asarray(trim_mean(points, byzantine / n + 1e-9, axis=0))
    if name == "geometric-median":
        start, options = np.median(points, axis=0) + 0.1, {"gtol": 1e-9, "maxiter": 10_000}
        found = minimize(lambda v: total(points, v), start, method="BFGS", options=options)
        return np.asarray(found.x)
    scores = []
    for i in range(n):
        others = [float(((points[i] - points[j]) ** 2).sum()) for j in range(n) if j != i]
        scores.append(sum(sorted(others)[: n - byzantine - 2]))
    best = np.argsort(scores)
    return points[best[0]] if name == "krum" else points[best[: n - byzantine]].mean(axis=0)


def drawn(seed: int, n: int, d: int) -> Points:
    """Normal numbers about a point that is not 0, as fp32 holds them."""
    points = np.random.default_rng(seed).normal(0.3, 1.0, (n, d))
    return points.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(("n", "byzantine"), [(7, 2), (9, 3), (12, 1)])
@pytest.mark.parametrize("d", [2, 3, 200])
@pytest.mark.parametrize("name", ROBUST)
def test_a_rule_is_that_of_numpy_and_scipy(
    name: str, d: int, n: int, byzantine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerance: rounding of float64 (1e-12); of the minimiser, 1e-5."""
    monkeypatch.setattr(robust, "STEPS", 10_000)
    for seed in range(5):
        points = drawn(seed, n, d)
        found, expected = combined(name, points, byzantine), reference(name, points, byzantine)
        tolerance = 1e-5 if name == "geometric-median" else 1e-12
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("d", [2, 3, pytest.param(200, marks=pytest.mark.slow)])
def test_the_geometric_median_is_near_the_least_sum_after_the_steps_it_makes(d: int) -> None:
    """Within 1e-3, also where it begins at an update and is slow to leave it (d = 2)."""
    for seed in range(20):
        points = drawn(seed, 7, d)
        found = total(points, combined("geometric-median", points, 2))
        assert found <= (1 + 1e-3) * total(points, reference("geometric-median", points, 2))


@pytest.mark.parametrize("name", ROBUST)
def test_scratch_that_holds_less_than_an_update_changes_only_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = drawn(0, 9, 200)
    whole = combined(name, points, 3)
    monkeypatch.setattr(robust, "_SCRATCH", 9 * 7)  # seven numbers at a time
    np.testing.assert_allclose(combined(name, points, 3), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ROBUST)
def test_no_order_of_arrival_changes_a_bit(name: str) -> None:
    updates = states(np.concatenate([drawn(1, 4, 50), 1e-3 * drawn(2, 1, 50)]))
    digests = {
        state_digest(find_robust(name)({client: updates[client] for client in order}, 1))
        for order in itertools.permutations(updates)
    }
    assert len(digests) == 1


def test_what_is_too_few_is_refused_naming_the_limit() -> None:
    for name, needed in (("krum", 7), ("multi-krum", 7), ("median", 5), ("trimmed-mean", 5),
                         ("geometric-median", 5)):  # fmt: skip
        rule = find_robust(name)
        assert rule.fewest(2) == needed
        rule(states(drawn(0, needed, 3)), 2)
        words = rf"{name} of {needed - 1} updates.*n >= 2f \+ {needed - 4} = {needed} are needed"
        with pytest.raises(ValueError, match=words):
            rule(states(drawn(0, needed - 1, 3)), 2)
    with pytest.raises(ValueError, match="-1 attackers: at least 0"):
        find_robust("median")(states(drawn(0, 3, 3)), -1)


def test_updates_that_do_not_match_are_refused() -> None:
    updates = states(drawn(0, 5, 3))
    updates[0] = {"a": updates[0]["a"]}
    with pytest.raises(ValueError, match="names and shapes are not all the same"):
        find_robust("krum")(updates, 1)


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    words = "'mean': allowed: none, median, trimmed-mean, krum, multi-krum, geometric-median"
    with pytest.raises(UserError, match=words):
        find_robust("mean")


# At the limit, and beyond it


def attacks(seed: int, honest: Points, f: int) -> list[Points]:
    """What f attackers send: all the same, each another way, or just outside the honest range."""
    random, d = np.random.default_rng(seed), honest.shape[1]
    along = np.ones((f, d)) / np.sqrt(d)
    outwards = random.normal(size=(f, d))
    outwards /= np.linalg.norm(outwards, axis=1, keepdims=True)
    return [FAR * along, -FAR * along, FAR * outwards, honest.max(axis=0) + 1e-3 * np.ones((f, d))]


@pytest.mark.parametrize("f", [1, 2, 4])
@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("name", ROBUST)
def test_at_the_limit_attackers_leave_the_result_among_the_honest(
    name: str, d: int, f: int
) -> None:
    n = find_robust(name).fewest(f)
    for seed in range(3):
        honest = drawn(seed, n - f, d)
        for number, sent in enumerate(attacks(seed, honest, f)):
            near = number == 3
            found = combined(name, np.concatenate([honest[1:], sent, honest[:1]]), f)
            if name in ("median", "trimmed-mean"):
                assert (honest.min(axis=0) <= found).all()
                assert (found <= honest.max(axis=0)).all()
            elif name == "krum" and not near:
                assert (found == honest).all(axis=1).any()
            elif name == "multi-krum" and not near:
                np.testing.assert_allclose(found, honest.mean(axis=0), rtol=0, atol=1e-12)
            else:
                center = honest.mean(axis=0)
                radius = np.linalg.norm(honest - center, axis=1).max()
                factor = 2 * (n - f) / (n - 2 * f)
                assert np.linalg.norm(found - center) <= factor * radius
            assert np.linalg.norm(np.concatenate([honest, sent]).mean(axis=0)) > 1 or near


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "geometric-median"])
def test_one_attacker_more_moves_it_as_far_as_they_like(name: str) -> None:
    """2f + 1 updates, of which f + 1 are the same."""
    honest = drawn(0, 2, 3)
    inside, beyond = (np.concatenate([honest, np.full((k, 3), FAR)]) for k in (1, 3))
    assert np.abs(combined(name, inside, 1)).max() < 10
    assert np.abs(combined(name, beyond, 2)).max() > FAR / 4
    with pytest.raises(ValueError, match="are needed"):
        combined(name, beyond, 3)  # who would say so is told


def test_one_attacker_more_has_krum_pick_an_attacker() -> None:
    """Five updates, two neighbours. Two of the attackers' are each other's nearest."""
    one = [[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0], [31.0, 10.0]]
    two = [[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [29.0, 10.0], [29.0, 10.0]]
    # 200 of the second; of the attacker's, 101 + 221.
    assert combined("krum", one, 1).tolist() == [10.0, 0.0]
    # 200 of the second; of an attacker's, 0 + 181.
    assert combined("krum", two, 1).tolist() == [29.0, 10.0]
    # And of 2f + 2 + 1 updates f + 2 may be anywhere.
    three = [[0.0, 0.0], [10.0, 0.0], *[[FAR, 0.0]] * 3]
    assert combined("krum", three, 1).tolist() == [FAR, 0.0]
