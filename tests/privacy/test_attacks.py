"""The attacks on constructed cases whose gain is known, and the view that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlpp_ray.aggregation.products import product, rotate
from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy.attacks import ATTACKS, feasible, find_attacks
from fedlpp_ray.privacy.sealed import Sealed
from fedlpp_ray.privacy.view import Base, Means, Received, Returns, View, ViewError
from fedlpp_ray.quantization import Quantizer
from fedlpp_ray.state import State, part

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.weight"


@dataclass
class FakeTools:
    """Losses by the head's first number; training adds the client's number to the head."""

    clients: frozenset[int] = frozenset({3})
    bases: tuple[Base, ...] = ("client",)
    means: frozenset[Means] = frozenset(
        {"architecture", "auxiliary", "masks", "average", "returns"}
    )
    tuned: list[State] = field(default_factory=list)
    taught: list[list[tuple[float, State]]] = field(default_factory=list)

    def loss(self, state: State, base: Base) -> float:
        return float(state[HEAD].flatten()[0])

    def take_part(self, read: Received, client: int, base: Base) -> State:
        return read.start | {HEAD: read.start[HEAD] + client}

    def tune(self, state: State, base: Base) -> State:
        self.tuned.append(state)
        return state

    def distil(self, state: State, teachers: Sequence[tuple[float, State]], base: Base) -> State:
        self.tuned.append(state)
        self.taught.append(list(teachers))
        return state


def view_of(states: list[State], tools: FakeTools | None = None) -> View:
    received = tuple(Received(made, 3, state) for made, state in enumerate(states, 1))
    readable = {3: frozenset(range(1, len(states) + 1))}
    returns = Returns({1: {3: 1.0}}, 1.0, states[0])
    last = range(len(states) - 1, len(states) + 1)
    return View(received, 4, tools or FakeTools(), readable, averaged=last, returns=returns)


def state(seed: int = 0) -> State:
    random = torch.Generator().manual_seed(seed)
    shapes = {A: (4, 32), B: (24, 4), HEAD: (6, 24)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def broadcasts(
    secret: State, count: int, rounding: str = "stochastic", turned: bool = False
) -> list[State]:
    """A constant as it is sent again and again."""
    quantizer = Quantizer(2, "int", 64, "fp32", rounding)  # type: ignore[arg-type]
    found = []
    for made in range(count):
        random = torch.Generator().manual_seed(100 + made)
        sent = rotate(secret, random) if turned else secret
        found.append({n: quantizer.quantize(t, random).dequantize() for n, t in sent.items()})
    return found


def error(found: State, secret: State, of: Callable[[State], Tensor]) -> float:
    return float((of(found) - of(secret)).norm() / of(secret).norm())


def weights(found: State) -> Tensor:
    return product(found, "layer").dense()


def factor(found: State) -> Tensor:
    return found[A]


def test_the_mean_of_dithered_broadcasts_of_a_constant_recovers_it() -> None:
    """The error of a mean of T independent unbiased roundings is 1 / sqrt(T) of one's."""
    secret = state()
    view = view_of(broadcasts(secret, 64))
    one = error(ATTACKS["last-broadcast"].attack(view), secret, factor)
    mean = error(ATTACKS["mean-factors"].attack(view), secret, factor)
    assert one > 0.4
    assert mean == pytest.approx(one / 8, rel=0.25)
    assert error(ATTACKS["mean-products"].attack(view), secret, weights) < 0.25


def test_rounding_to_nearest_of_a_constant_gives_a_mean_nothing() -> None:
    secret = state()
    view = view_of(broadcasts(secret, 8, "nearest"))
    last = ATTACKS["last-broadcast"].attack(view)
    for name in ("mean-factors", "recent-factors", "trend"):
        torch.testing.assert_close(ATTACKS[name].attack(view)[A], last[A], rtol=0, atol=1e-6)


def test_a_gauge_that_turns_stops_the_mean_of_factors_and_not_that_of_products() -> None:
    secret = state()
    view = view_of(broadcasts(secret, 64, turned=True))
    assert error(ATTACKS["mean-factors"].attack(view), secret, weights) > 0.9
    assert error(ATTACKS["mean-products"].attack(view), secret, weights) < 0.3


def test_a_mean_of_products_is_the_best_of_its_rank() -> None:
    states = [state(1), state(2)]
    found = ATTACKS["mean-products"].attack(view_of(states))
    mean = (weights(states[0]) + weights(states[1])) / 2
    u, s, vh = np.linalg.svd(mean.numpy())
    expected = (u[:, :4] * s[:4]) @ vh[:4]
    np.testing.assert_allclose(weights(found).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(found[HEAD], (states[0][HEAD] + states[1][HEAD]) / 2)


@pytest.mark.parametrize(("name", "weight"), [("mean", 0.5), ("recent", 1 / (1 + 2 ** (-1 / 3)))])
def test_a_whole_mean_of_products_loses_nothing(name: str, weight: float) -> None:
    states = [state(1), state(2)]
    found = ATTACKS[f"{name}-products-full"].attack(view_of(states))
    mean = (1 - weight) * weights(states[0]) + weight * weights(states[1])
    whole = found["layer.residual.weight"].double() + weights(found)
    torch.testing.assert_close(whole, mean, atol=1e-5, rtol=0)
    cut = ATTACKS[f"{name}-products"].attack(view_of(states))
    assert float((weights(cut) - mean).norm()) > 0.3 * float(mean.norm())


def test_recent_broadcasts_weigh_twice_as_much_as_those_three_before() -> None:
    states = [{HEAD: torch.tensor([float(value)])} for value in (1, 0, 0, 0)]
    by_hand = 0.5 / (1 + 2 ** (-1 / 3) + 2 ** (-2 / 3) + 0.5)
    found = ATTACKS["recent-factors"].attack(view_of(states))
    assert found[HEAD].item() == pytest.approx(by_hand, rel=1e-6)


def test_the_trend_is_the_end_of_the_least_squares_line() -> None:
    values = np.random.default_rng(0).normal(size=9) + np.arange(9)
    states = [{HEAD: torch.tensor([value], dtype=torch.float32)} for value in values]
    times = np.arange(4, 10)
    line = np.polyfit(times, values[-6:], 1)
    found = ATTACKS["trend"].attack(view_of(states))
    assert found[HEAD].item() == pytest.approx(float(np.polyval(line, 9)), abs=1e-5)
    two = ATTACKS["trend"].attack(view_of(states[:2]))
    assert two[HEAD] == states[1][HEAD]


def test_a_gauge_that_turns_stops_the_trend_of_factors_and_not_that_of_products() -> None:
    """S moves along a line, and each broadcast is dithered, in a gauge of its own."""
    start, drift, quantizer = state(1), state(2), Quantizer(4, "int", 64, "fp32", "stochastic")
    states = []
    for made in range(1, 13):
        random = torch.Generator().manual_seed(made)
        secret = {n: t + 0.05 * made * drift[n] for n, t in start.items()}
        sent = rotate(secret, random)
        states.append({n: quantizer.quantize(t, random).dequantize() for n, t in sent.items()})
    view = view_of(states)
    assert error(ATTACKS["trend"].attack(view), secret, weights) > 0.5
    found = error(ATTACKS["trend-products"].attack(view), secret, weights)
    assert found < 0.85 * error(view.last.state, secret, weights)
    assert found < 0.7 * error(ATTACKS["mean-products"].attack(view), secret, weights)


def test_the_mean_of_the_states_that_the_final_model_averages() -> None:
    states = [{HEAD: torch.tensor([float(value)])} for value in (1, 5, 9)]
    assert ATTACKS["mean-final"].attack(view_of(states))[HEAD] == 7
    with pytest.raises(ViewError, match="is no mean of its states"):
        ATTACKS["mean-final"].attack(replace(view_of(states), averaged=()))


@pytest.mark.parametrize(
    ("made", "averaged", "expected"),
    [
        ((1, 3, 5), (3, 4, 5), (5 + 5 + 9) / 3),  # every second round one
        ((1, 2, 5), (7, 8, 9, 10), 9),  # it was not there any more
        ((4, 5, 6), (2, 3, 4, 5), (1 + 1 + 1 + 5) / 4),  # it came late: the first is the nearest
        ((1, 2, 2), (1, 2), (1 + (5 + 9) / 2) / 2),  # of one round two editions
    ],
)
def test_the_final_mean_is_over_rounds_however_many_broadcasts_they_had(
    made: tuple[int, ...], averaged: tuple[int, ...], expected: float
) -> None:
    states = [{HEAD: torch.tensor([float(value)])} for value in (1, 5, 9)]
    received = tuple(Received(m, 3, each) for m, each in zip(made, states, strict=True))
    view = View(received, 4, FakeTools(), {3: frozenset(made)}, averaged=averaged)
    assert ATTACKS["mean-final"].attack(view)[HEAD] == pytest.approx(expected)


def test_a_state_is_followed_by_returns_inside_of_the_cells() -> None:
    """Training adds 3. From 0: lr 0.5 of it is 1.5, in the cell [1, 2]; then 3, cut to 2.5."""
    cells = [None, (1.0, 2.0), (2.0, 2.5)]
    received = tuple(
        Received(
            made,
            3,
            {HEAD: torch.tensor([9.0])},
            {HEAD: (torch.tensor([c[0]]), torch.tensor([c[1]]))} if c else {},
        )
        for made, c in enumerate(cells, 1)
    )
    returns = Returns({1: {3: 1.0}, 2: {3: 1.0}}, 0.5, {HEAD: torch.tensor([0.0])})
    readable = {3: frozenset({1, 2, 3})}
    view = View(received, 4, FakeTools(), readable, returns=returns)
    two = replace(view, received=received[:2])
    assert ATTACKS["followed"].attack(two)[HEAD] == 1.5
    assert ATTACKS["followed"].attack(view)[HEAD] == 2.5
    missed = replace(view, received=(received[0], received[2]))
    assert ATTACKS["followed"].attack(missed)[HEAD] == 9
    still = replace(two, returns=replace(returns, weights={}))
    assert ATTACKS["followed"].attack(still)[HEAD] == 1
    with pytest.raises(ViewError, match="does not follow from"):
        ATTACKS["followed"].attack(replace(view, returns=None))


def test_what_a_reader_trains_from_is_not_what_it_says_of_the_servers_state() -> None:
    """Of a mask: the attacks that do as the client does have the one, all others the other."""
    raw, settled = state(1), state(2)
    view = view_of([settled])
    view = replace(view, received=(replace(view.last, masked=raw),))
    for name in ("last-broadcast", "best-broadcast"):
        assert ATTACKS[name].attack(view) is raw
    assert torch.equal(ATTACKS["after-training"].attack(view)[HEAD], raw[HEAD] + 3)
    assert ATTACKS["unmasked-broadcast"].attack(view) is settled
    assert torch.equal(ATTACKS["mean-factors"].attack(view)[A], settled[A])


def test_the_interval_estimate_lies_in_the_cells_and_beats_both_of_its_parts() -> None:
    """S drifts; rounding to nearest. The mean lags, the newest code is coarse."""
    quantizer = Quantizer(2, "int", 64)
    random = torch.Generator().manual_seed(0)
    start, drift = torch.randn(64, 64, generator=random), torch.randn(64, 64, generator=random)
    received, secret = [], start
    for made in range(1, 13):
        secret = start + 0.05 * made * drift
        tensor = quantizer.quantize(secret)
        received.append(Received(made, 3, {HEAD: tensor.dequantize()}, {HEAD: tensor.cells()}))
    view = View(tuple(received), 4, FakeTools(), {3: frozenset(range(1, 13))})
    found = ATTACKS["interval"].attack(view)[HEAD]
    low, high = view.last.cells[HEAD]
    assert ((low <= found) & (found <= high)).all()
    assert ((low <= secret) & (secret <= high)).all()

    def distance(estimate: Tensor) -> float:
        return float((estimate - secret).norm())

    mean = ATTACKS["recent-factors"].attack(view)[HEAD]
    assert distance(found) < distance(mean)
    assert distance(found) < 0.9 * distance(view.last.state[HEAD])


def test_the_best_broadcast_is_that_of_the_lowest_loss_and_of_equals_the_newest() -> None:
    states = [{HEAD: torch.tensor([value, number])} for number, value in enumerate((3.0, 1, 1, 2))]
    assert ATTACKS["best-broadcast"].attack(view_of(states))[HEAD][1] == 2


def test_colluders_add_up_what_each_of_them_would_return() -> None:
    tools = FakeTools(clients=frozenset({3, 7}))
    view = view_of([state()], tools)
    updated = ATTACKS["pooled-updates"].attack(view)
    torch.testing.assert_close(updated[HEAD], view.last.state[HEAD] + 5)
    own = ATTACKS["after-training"].attack(view)
    torch.testing.assert_close(own[HEAD], view.last.state[HEAD] + 3)


def test_tuning_starts_from_the_newest_and_from_the_mean() -> None:
    tools = FakeTools()
    view = view_of(broadcasts(state(), 4), tools)
    for name in ("tuned", "tuned-mean"):
        ATTACKS[name].attack(view)
    assert tools.tuned[0] is view.last.state
    expected = ATTACKS["recent-products"].attack(view)
    torch.testing.assert_close(tools.tuned[1][A], expected[A], rtol=0, atol=0)


def test_what_is_taught_is_said_by_the_newest_rounds_and_most_by_the_newest() -> None:
    tools = FakeTools()
    view = view_of(broadcasts(state(), 8), tools)
    for name in ("distilled", "distilled-mean"):
        ATTACKS[name].attack(view)
    assert tools.tuned[0] is view.last.state
    expected = ATTACKS["recent-products"].attack(view)
    torch.testing.assert_close(tools.tuned[1][A], expected[A], rtol=0, atol=0)
    weights_of, states = zip(*tools.taught[0], strict=True)
    assert all(x is y.state for x, y in zip(states, view.received[-6:], strict=True))
    by_hand = 2.0 ** (-np.arange(5, -1, -1) / 3)
    np.testing.assert_allclose(weights_of, by_hand / by_hand.sum())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_nothing_of_what_it_was_given(name: str) -> None:
    view = view_of(broadcasts(state(), 3))
    before = [{n: t.clone() for n, t in each.state.items()} for each in view.received]
    found = ATTACKS[name].attack(view)
    assert {n for n in found if part(n) != "residual"} == before[0].keys()
    for each, old in zip(view.received, before, strict=True):
        assert all(torch.equal(each.state[n], old[n]) for n in old)


def test_a_view_refuses_what_the_adversary_does_not_have() -> None:
    view = view_of([state(1), state(2)])
    other = Received(2, 5, state(3))
    with pytest.raises(ViewError, match="client 5 could not read the broadcast of round 2"):
        replace(view, received=(*view.received, other))
    with pytest.raises(ViewError, match="client 3 could not read the broadcast of round 9"):
        replace(view, received=(*view.received, Received(9, 3, state(3))))
    with pytest.raises(ViewError, match="client 5 is none of the adversary's"):
        replace(view, readable={3: frozenset({1, 2}), 5: frozenset({2})})
    with pytest.raises(ViewError, match="what client 5 returned is none of the adversary's"):
        replace(view, returns=Returns({1: {3: 1.0, 5: 1.0}}, 1.0, {}))
    with pytest.raises(ViewError, match="has no public base"):
        replace(view, base="public")
    with pytest.raises(ViewError, match="received no broadcast"):
        replace(view, received=())
    with pytest.raises(ViewError, match="not in the order"):
        replace(view, received=view.received[::-1])


def test_an_attack_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(UserError, match="attack 'mean' is not one of: last-broadcast, "):
        find_attacks(["mean"])
    assert list(find_attacks(["trend"])) == ["trend"]


def sealed(view: View) -> View:
    tools = Sealed(view.tools, view.last.state)
    received = tuple(map(tools.seal, view.received))
    return replace(view, received=received, tools=tools, returns=None)


@pytest.mark.parametrize("name", ATTACKS)
def test_who_does_not_know_the_architecture_makes_the_attacks_that_do_not_need_it(
    name: str,
) -> None:
    """And what these make of numbered tensors is what they make of named ones."""
    view = view_of(broadcasts(state(), 4))
    hidden = sealed(view)
    assert isinstance(hidden.tools, Sealed)
    if "architecture" in ATTACKS[name].needs:
        with pytest.raises(
            ViewError, match=r"which tensors are factors|cannot train but as|not follow"
        ):
            ATTACKS[name].attack(hidden)
        return
    found, expected = hidden.tools.open(ATTACKS[name].attack(hidden)), ATTACKS[name].attack(view)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_sealed_client_has_one_base_and_trains_as_in_a_round_only() -> None:
    hidden = sealed(view_of([state()], FakeTools(bases=("client", "public"))))
    assert list(hidden.last.state) == ["tensor 1", "tensor 2", "tensor 0"]
    with pytest.raises(ViewError, match="has no public base"):
        replace(hidden, base="public")
    with pytest.raises(ViewError, match="cannot train but as a client does"):
        hidden.tools.tune(hidden.last.state, "client")
    with pytest.raises(ViewError, match="cannot train but as a client does"):
        hidden.tools.distil(hidden.last.state, [(1.0, hidden.last.state)], "client")


def test_of_the_ladder_what_needs_more_than_there_is_is_left_out_with_the_reason() -> None:
    able, left_out = feasible(ATTACKS, frozenset({"architecture"}))
    assert {n for n, why in left_out.items() if why == "needs adversary.auxiliary"} == {
        *("distilled", "distilled-mean")
    }
    assert left_out["mean-final"] == "needs server.final_average"
    assert left_out.keys() == {
        *("unmasked-broadcast", "mean-final", "followed", "distilled", "distilled-mean")
    }
    assert able.keys() | left_out.keys() == ATTACKS.keys()
    blind, left_out = feasible(ATTACKS, frozenset())
    assert list(blind) == [
        *("last-broadcast", "best-broadcast", "mean-factors", "recent-factors", "trend"),
        *("interval", "intersection", "crossings", "after-training", "pooled-updates"),
    ]
    both = "needs adversary.architecture 'known' and adversary.auxiliary"
    assert left_out["distilled"] == both
    assert feasible(ATTACKS, FakeTools().means) == (ATTACKS, {})
