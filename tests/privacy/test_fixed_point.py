"""Fixed point: what is lost, against rational numbers, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import Grid, Session, length_of, run
from fedlpp_ray.state import schema_of
from tests.privacy.sessions import seeded

BITS = st.sampled_from([32, 64])
FP32 = st.floats(-1, 1, width=32)


def total_of(grid: Grid, rows: list[np.ndarray]) -> np.ndarray:
    return sum(rows, np.zeros_like(rows[0]))


def state_of(values: list[float], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "b": torch.tensor(values[:1], dtype=dtype),
        "a": torch.tensor([values[1:]], dtype=dtype),
    }


def test_the_unit_is_the_smallest_with_which_no_sum_wraps() -> None:
    cases = [(10, 1, 1.0), (7, 1000, 0.3), (1, 1, 1e-30), (50, 9, 1e38)]
    cases.append((4, 1, 0.5 - 2.0**-32))  # four roundings upwards would make 2^31
    for bits, limit in ((32, 2**31), (64, 2**53)):
        for clients, weight, clip in cases:
            grid = Grid(clip, weight, clients, bits)

            def largest(unit: float, grid: Grid = grid) -> Fraction:
                each = Fraction(grid.max_weight) * Fraction(grid.clip) / Fraction(unit)
                return grid.clients * (each + Fraction(1, 2))

            assert largest(grid.unit) < limit
            assert largest(grid.unit / 2) >= limit - 1
            assert math.frexp(grid.unit)[0] == 0.5


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(FP32, min_size=3, max_size=3), min_size=1, max_size=9),
    weights=st.lists(st.integers(1, 500), min_size=9, max_size=9),
    bits=BITS,
    scale=st.sampled_from([1.0, 2.0**-20, 2.0**20]),
)
def test_a_weighted_sum_is_off_by_half_a_unit_per_client(
    rows: list[list[float]], weights: list[int], bits: int, scale: float
) -> None:
    rows = [[value * scale for value in row] for row in rows]
    grid = Grid(scale, 500, 9, bits)  # type: ignore[arg-type]
    states = [state_of(row) for row in rows]
    vectors = [grid.encode(s, w) for s, w in zip(states, weights, strict=False)]
    found, weight = grid.decode(total_of(grid, vectors), schema_of(states[0]))
    mean = grid.mean(total_of(grid, vectors), schema_of(states[0]), len(vectors))
    assert weight == sum(weights[: len(rows)])
    flat = [*found["b"].tolist(), *found["a"][0].tolist()]
    means = [*mean["b"].tolist(), *mean["a"][0].tolist()]
    for i in range(3):
        exact = sum(w * Fraction(row[i]) for w, row in zip(weights, rows, strict=False))
        assert abs(Fraction(flat[i]) - exact) <= Fraction(grid.unit) / 2 * len(rows)
        rounding = Fraction(math.ulp(means[i]))
        assert abs(Fraction(means[i]) - exact / weight) <= Fraction(grid.unit) / 2 + rounding


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(-(2**20), 2**20), min_size=3, max_size=3), min_size=1, max_size=9
    )
)
def test_on_the_grid_the_sum_is_the_float64_sum_exactly(rows: list[list[int]]) -> None:
    grid = Grid(1.0, 1, 9)
    assert grid.unit <= 2.0**-20
    states = [state_of([value * 2.0**-20 for value in row]) for row in rows]
    vectors = [grid.encode(each) for each in states]
    found, _ = grid.decode(total_of(grid, vectors), schema_of(states[0]))
    for name in ("a", "b"):
        plain = torch.stack([each[name].double() for each in states]).sum(0)
        assert torch.equal(found[name], plain)


def test_the_secure_weighted_mean_is_numpys() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(-2, 2, (5, 40)).astype(np.float32)
    weights = rng.integers(1, 200, 5)
    grid = Grid(2.0, 200, 5)
    states = [{"w": torch.from_numpy(row).reshape(8, 5)} for row in values]
    schema = schema_of(states[0])
    session = Session(0, tuple(range(5)), 3, length_of(schema))
    encoded = [grid.encode(s, int(w)) for s, w in zip(states, weights, strict=True)]
    outcome = run(session, dict(enumerate(encoded)), {1: "masked", 4: "unmask"}, seeded(1))
    kept = [0, 2, 3, 4]
    expected = np.average(values[kept].astype(np.float64), axis=0, weights=weights[kept])
    found = grid.mean(outcome.total, schema, len(outcome.survivors))["w"].numpy().reshape(-1)
    assert np.abs(found - expected).max() <= grid.unit / 2 + 1e-15
    assert grid.decode(outcome.total, schema)[1] == weights[kept].sum()


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sum_does_not_wrap(bits: int, sign: int) -> None:
    grid = Grid(0.7, 1000, 30, bits)  # type: ignore[arg-type]
    value = np.nextafter(np.float32(0.7), np.float32(0)) * sign
    vector = grid.encode({"x": torch.tensor([value])}, 1000)
    found, weight = grid.decode(total_of(grid, [vector] * 30), {"x": (1,)})
    assert weight == 30_000
    assert float(found["x"][0]) == pytest.approx(30_000 * float(value), abs=15 * grid.unit)


@pytest.mark.parametrize("value", [1.0000001, -1.5, math.inf, -math.inf, math.nan])
def test_a_value_out_of_range_is_an_error_at_the_client(value: float) -> None:
    state = {"fine": torch.ones(3), "x": torch.tensor([0.0, value, 0.5])}
    with pytest.raises(MessageError, match=r"x: holds .*; at most 1 is allowed"):
        Grid(1.0, 10, 3).encode(state, 10)


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_out_of_range_is_an_error_at_the_client(weight: int) -> None:
    with pytest.raises(MessageError, match=f"its weight is {weight}; from 1 to 10 is allowed"):
        Grid(1.0, 10, 3).encode({"x": torch.ones(1)}, weight)


@pytest.mark.parametrize(
    ("clip", "max_weight", "clients", "bits", "message"),
    [
        (0.0, 1, 1, 64, "clip is 0.0"),
        (math.inf, 1, 1, 64, "clip is inf"),
        (math.nan, 1, 1, 64, "clip is nan"),
        (1.0, 0, 1, 64, "max_weight is 0; from 1 to 2"),
        (1.0, 2**30, 1, 64, "max_weight is 1073741824"),
        (1.0, 1, 0, 64, "0 clients"),
        (1.0, 2**28, 9, 32, "9 clients of weight 268435456 do not fit into 32 bits"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(
    clip: float, max_weight: int, clients: int, bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(clip, max_weight, clients, bits)  # type: ignore[arg-type]


def test_empty_tensors_and_scalars_keep_their_place() -> None:
    state = {"c": torch.tensor(0.5), "a": torch.zeros(0, 4), "b": torch.tensor([[-0.25]])}
    grid, schema = Grid(1.0, 3, 2), schema_of(state)
    vector = grid.encode(state, 3)
    assert vector.shape == (length_of(schema),) == (3,)
    found, weight = grid.decode(vector, schema)
    assert weight == 3
    assert {name: tuple(t.shape) for name, t in found.items()} == schema
    assert (float(found["c"]), float(found["b"])) == (1.5, -0.75)
    with pytest.raises(ValueError, match="for 3 numbers"):
        grid.decode(vector[1:], schema)
