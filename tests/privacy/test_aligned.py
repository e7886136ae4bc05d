"""Attacks on messages of each client's own, where what they gain is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlpp_ray.aggregation.products import rotate
from fedlpp_ray.federation.perturbation import Perturbation
from fedlpp_ray.privacy.attacks import ATTACKS
from fedlpp_ray.privacy.attacks.aligned import turn
from fedlpp_ray.privacy.attacks.means import recent
from fedlpp_ray.privacy.view import Received, View
from fedlpp_ray.quantization import Quantizer
from fedlpp_ray.state import State
from tests.privacy.test_attacks import (
    HEAD,
    A,
    FakeTools,
    broadcasts,
    error,
    factor,
    state,
    view_of,
    weights,
)


def head(found: State) -> torch.Tensor:
    return found[HEAD]


def colluding(rounds: list[dict[int, State]]) -> View:
    """What colluders have whose editions of each round these are."""
    received = tuple(
        Received(made, client, found)
        for made, editions in enumerate(rounds, 1)
        for client, found in editions.items()
    )
    clients = frozenset(each.client for each in received)
    readable = {c: frozenset(x.made for x in received if x.client == c) for c in clients}
    return View(received, 4, FakeTools(clients), readable)


def editions(secret: State, size: float, round: int, clients: int, cohort: int) -> dict[int, State]:
    """Of the first so many clients of a cohort of equal weights, without quantization."""
    perturbation = Perturbation(size, 0, round, secret, dict.fromkeys(range(cohort), 1))
    return {client: perturbation.of(client) for client in range(clients)}


def test_the_gauge_of_a_broadcast_is_found_from_another() -> None:
    """Without quantization exactly, but for fp32."""
    secret = state()
    turned = rotate(secret, torch.Generator().manual_seed(1))
    assert error(turned, secret, factor) > 0.5
    assert error(turn(turned, secret, ["layer"]), secret, factor) < 1e-6


def test_rotation_stops_the_mean_of_factors_and_alignment_and_products_get_through() -> None:
    """Who aligns has what `recent-factors` has of broadcasts that are not turned."""
    secret = state()
    view, still = view_of(broadcasts(secret, 64, turned=True)), view_of(broadcasts(secret, 64))
    for name in ("mean-factors", "recent-factors"):
        assert error(ATTACKS[name].attack(view), secret, weights) > 0.9
    known = error(ATTACKS["recent-factors"].attack(still), secret, weights)
    assert known < 0.6
    found = error(ATTACKS["aligned-factors"].attack(view), secret, weights)
    assert found == pytest.approx(known, rel=0.15)
    assert error(ATTACKS["mean-products"].attack(view), secret, weights) < 0.3


def test_alignment_extrapolates_where_a_trend_of_factors_cannot() -> None:
    """A line, each point in another gauge, unquantized: its end exactly."""
    start, end = state(1), state(2)
    line = [{n: start[n] + t / 20 * (end[n] - start[n]) for n in start} for t in range(7)]
    turned = [rotate(each, torch.Generator().manual_seed(t)) for t, each in enumerate(line)]
    view = view_of(turned)
    assert error(ATTACKS["trend"].attack(view), line[-1], weights) > 0.5
    assert error(ATTACKS["aligned-trend"].attack(view), line[-1], weights) < 0.05


@pytest.mark.parametrize("colluders", [1, 3, 6, 8])
def test_colluders_average_the_noise_of_a_round_as_a_draw_without_replacement(
    colluders: int,
) -> None:
    """m of a cohort of k: s sqrt((k - m) / (m (k - 1))), of all nothing; 144 values, so 20 %."""
    secret = state()
    view = colluding([editions(secret, 0.5, 1, colluders, 8)])
    known = 0.5 * math.sqrt((8 - colluders) / (colluders * 7))
    found = error(ATTACKS["aligned-last"].attack(view), secret, head)
    assert found == pytest.approx(known, rel=0.2, abs=1e-6)
    last = error(ATTACKS["last-broadcast"].attack(view), secret, head)
    assert last == pytest.approx(0.5, rel=0.2)


def test_one_client_averages_its_noise_over_rounds() -> None:
    secret = state()
    view = colluding([editions(secret, 0.5, made, 1, 4) for made in range(1, 65)])
    found = error(ATTACKS["mean-factors"].attack(view), secret, head)
    assert found == pytest.approx(0.5 / 8, rel=0.2)


def test_a_whole_cohort_has_the_state_through_gauges_of_each_but_for_the_alignment() -> None:
    """Noise, then a rotation for each: the gauge is found up to the noise; products too."""
    secret = state()
    each = {
        client: rotate(found, torch.Generator().manual_seed(client))
        for client, found in editions(secret, 0.3, 1, 8, 8).items()
    }
    view = colluding([each])
    one = error(ATTACKS["last-broadcast"].attack(view), secret, weights)
    assert error(ATTACKS["aligned-last"].attack(view), secret, weights) < one / 3
    assert error(ATTACKS["mean-factors"].attack(view), secret, weights) > 0.8
    assert error(ATTACKS["mean-products"].attack(view), secret, weights) < one / 2


def test_editions_of_one_round_are_of_one_age() -> None:
    """By hand; and a line through four rounds, of which the last has three points, as NumPy's."""
    values = [{0: 8.0, 1: 0.0}, {0: 2.0}, {0: 1.0}, {0: 6.0, 1: 4.0, 2: 2.0}]
    view = colluding(
        [{c: {HEAD: torch.tensor([x])} for c, x in editions.items()} for editions in values]
    )
    assert recent(view) == pytest.approx([0.5] * 2 + [2 ** (-2 / 3), 2 ** (-1 / 3)] + [1.0] * 3)
    assert float(ATTACKS["aligned-last"].attack(view)[HEAD]) == pytest.approx(4.0)
    line = np.polyfit([1, 1, 2, 3, 4, 4, 4], [8.0, 0, 2, 1, 6, 4, 2], 1)
    found = float(ATTACKS["aligned-trend"].attack(view)[HEAD])
    assert found == pytest.approx(float(np.polyval(line, 4)), abs=1e-5)


def test_without_rotation_alignment_changes_next_to_nothing() -> None:
    secret = state()
    view = view_of(broadcasts(secret, 16, "nearest"))
    found = ATTACKS["aligned-factors"].attack(view)
    torch.testing.assert_close(found[A], view.last.state[A], rtol=0, atol=1e-5)


def test_cells_bound_a_mean_that_was_brought_into_their_gauge() -> None:
    """S drifts, each broadcast is rounded to nearest in a gauge of its own. The mean lags, and the
    newest is coarse; aligned and moved into the newest cells it is nearer than either."""
    start, drift, quantizer = state(1), state(2), Quantizer(2, "int", 64)
    received = []
    for made in range(1, 13):
        secret = {n: t + 0.05 * made * drift[n] for n, t in start.items()}
        sent = rotate(secret, torch.Generator().manual_seed(made))
        coded = {n: quantizer.quantize(t) for n, t in sent.items()}
        cells = {n: t.cells() for n, t in coded.items()}
        received.append(Received(made, 3, {n: t.dequantize() for n, t in coded.items()}, cells))
    view = View(tuple(received), 4, FakeTools(), {3: frozenset(range(1, 13))})
    found = {
        name: error(ATTACKS[name].attack(view), secret, weights)
        for name in ("last-broadcast", "interval", "aligned-factors", "aligned-interval")
    }
    assert found["aligned-interval"] < 0.85 * found["last-broadcast"]
    assert found["aligned-interval"] < found["aligned-factors"]
    assert found["aligned-interval"] < 0.85 * found["interval"]
