"""Sums that no order and no grouping changes, against rational numbers."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_ray.aggregation import ExactMean, ExactSum
from fedlpp_ray.aggregation.exact import LIMIT, RESOLUTION
from fedlpp_ray.state import state_digest

TERMS = 64
SCHEMA = {"x": (3,)}
VALUES = (
    st.floats(-(2.0**43), 2.0**43) | st.floats(-1e-3, 1e-3) | st.sampled_from([0.0, -0.0, 5e-324])
)
"""LIMIT / TERMS is 2^44."""
STATES = st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=12)


def state(values: list[float]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(values, dtype=torch.float64)}


def summed(rows: list[list[float]], schema: dict[str, tuple[int, ...]] = SCHEMA) -> ExactSum:
    total = ExactSum(schema, TERMS)
    for row in rows:
        total.add(state(row))
    return total


def bits(total: ExactSum | ExactMean) -> str:
    return state_digest(total.tensors()) + state_digest(total.values())


@settings(max_examples=200, deadline=None)
@given(rows=STATES, seed=st.integers(0, 10**6), data=st.data())
def test_any_order_and_any_grouping_give_the_same_bits(
    rows: list[list[float]], seed: int, data: st.DataObject
) -> None:
    shuffled = random.Random(seed).sample(rows, len(rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    edges = [0, *cuts, len(rows)]
    groups = [summed(shuffled[a:b]) for a, b in itertools.pairwise(edges)]
    random.Random(seed + 1).shuffle(groups)
    while len(groups) > 1:  # merged as a tree
        groups.append(groups.pop(0))
        groups[-1].merge(groups.pop(0))
    assert bits(groups[0]) == bits(summed(rows))
    assert groups[0].count == len(rows)


@settings(max_examples=200, deadline=None)
@given(rows=STATES, weight=st.floats(1e-3, 1.0))
def test_a_sum_is_that_of_rationals(rows: list[list[float]], weight: float) -> None:
    """Each term within 2^-63 of its float64 product; the value within an ulp of that."""
    total = ExactSum(SCHEMA, TERMS)
    for row in rows:
        total.add(state(row), weight)
    for i, found in enumerate(total.value("x").tolist()):
        exact = sum(Fraction(weight * row[i]) for row in rows)
        tolerance = Fraction(RESOLUTION) / 2 * len(rows) + Fraction(math.ulp(found))
        assert abs(Fraction(found) - exact) <= tolerance


def test_tensors_of_any_size_are_summed_as_each_would_be_alone() -> None:
    """They lie end to end and are worked at in runs of 2^15 elements."""
    schema = {"a": (), "b": (0,), "c": (40000,), "d": (3,), "e": (2, 32768), "f": (5, 1)}
    terms = [
        {
            name: torch.randn(shape, generator=torch.Generator().manual_seed(10 * i + len(shape)))
            for name, shape in sorted(schema.items(), reverse=i % 2 == 1)
        }
        for i in range(6)
    ]
    whole, half = ExactSum(schema, TERMS), ExactSum(schema, TERMS)
    for i, term in enumerate(terms):
        (whole if i < 4 else half).add(term, 0.1 * i)
    whole.merge(half)
    for name, shape in schema.items():
        alone = ExactSum({name: shape}, TERMS)
        for i, term in enumerate(terms):
            alone.add({name: term[name]}, 0.1 * i)
        assert torch.equal(whole.value(name), alone.value(name))
        for key, limb in alone.tensors().items():
            assert torch.equal(limb, whole.tensors()[key])


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=12
    )
)
def test_fp32_states_and_counts_are_summed_as_fsum_does(rows: list[list[float]]) -> None:
    """Correctly rounded, but for values below 2^-10, each of which is off by at most 2^-63."""
    total = ExactSum(SCHEMA, TERMS)
    for n, row in enumerate(rows):
        total.add({"x": torch.tensor(row)}, n + 1)
    for i, found in enumerate(total.value("x").tolist()):
        expected = math.fsum((n + 1) * row[i] for n, row in enumerate(rows))
        assert found == pytest.approx(expected, rel=2.0**-52, abs=len(rows) * RESOLUTION)


def test_opposite_extremes_cancel_and_leave_what_is_small() -> None:
    large, small = LIMIT / TERMS * (1 - 2.0**-53), 2.0**-62
    total = summed([[large, -large, small], [small, small, small], [-large, large, -small]])
    assert total.value("x").tolist() == [small, small, small]
    assert summed([[2.0**-64] * 3] * 8).value("x").tolist() == [0.0] * 3  # below the resolution


def test_many_terms_do_not_overflow_a_limb() -> None:
    """More than are added between two carries, each with the largest lower limb."""
    terms, term = 10_000, 2.0**-13
    total = ExactSum({"x": (1,)}, terms)
    for _ in range(terms):
        total.add({"x": torch.tensor([term], dtype=torch.float64)})
    assert total.value("x").item() == terms * term
    most = ExactSum({"x": (1,)}, 2)
    for _ in range(2):
        most.add({"x": torch.tensor([LIMIT / 2 - 1], dtype=torch.float64)})
    assert most.value("x").item() == LIMIT - 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, LIMIT / TERMS, -LIMIT / TERMS])
def test_what_could_overflow_is_refused_and_changes_nothing(value: float) -> None:
    total = summed([[1.0, 2.0, 3.0]])
    before = bits(total)
    for weight in (1.0, 0.0 if not math.isfinite(value) else -1.0):
        with pytest.raises(OverflowError, match="x: weight times value reaches"):
            total.add(state([0.0, value, 0.0]), weight)
    assert bits(total) == before
    assert total.count == 1


def test_other_names_shapes_and_a_term_too_many_are_refused() -> None:
    total = ExactSum(SCHEMA, 1)
    for other in ({"y": torch.zeros(3)}, {"x": torch.zeros(4)}, {}):
        with pytest.raises(ValueError, match="names and shapes"):
            total.add(other)
    total.add(state([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="1 terms cannot take another"):
        total.add(state([1.0, 1.0, 1.0]))
    full = ExactSum(SCHEMA, 1)
    full.add(state([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="more than 1 terms"):
        total.merge(full)
    with pytest.raises(ValueError, match="different schemas"):
        total.merge(ExactSum(SCHEMA, 2))


def test_a_mean_divides_by_the_weights_that_were_added() -> None:
    mean = ExactMean(SCHEMA, TERMS)
    mean.add(state([1.0, 2.0, 4.0]), 3.0)
    mean.add(state([5.0, 2.0, 0.0]), 1.0)
    assert mean.values()["x"].tolist() == [2.0, 2.0, 3.0]


def test_a_mean_survives_its_tensors_and_bad_ones_are_refused() -> None:
    mean = ExactMean(SCHEMA, TERMS)
    mean.add(state([1.0, -2.0, 4e-5]), 3.0)
    tensors = mean.tensors()
    parts = ExactMean.parts(SCHEMA)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == parts
    assert bits(ExactMean.of(SCHEMA, TERMS, tensors)) == bits(mean)
    for name, value in {
        "count": torch.tensor(TERMS + 1),
        "hi:x:x": torch.full((3,), 2**62),
        "lo:x:x": torch.full((3,), -(2**63)),
        "hi:weight": torch.tensor([-1]),
    }.items():
        with pytest.raises(ValueError, match=r"terms|positive"):
            ExactMean.of(SCHEMA, TERMS, tensors | {name: value})
