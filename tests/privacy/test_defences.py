"""Defences of the broadcast's codes, and the attacks that they stop, on cases of known gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fedlpp_ray.privacy.attacks import ATTACKS
from fedlpp_ray.privacy.view import Received, View
from fedlpp_ray.quantization import Guard, QuantizedTensor, Quantizer, draw
from tests.privacy.test_attacks import HEAD, FakeTools

INT2, INT3 = Quantizer(2, "int", 64), Quantizer(3, "int", 64)
"""Levels -1, 0 and 1, and thirds."""
STILL = Guard(hysteresis=1.0, hold_scales=True)


def view_of(
    secrets: Sequence[Tensor],
    guard: Guard,
    quantizer: Quantizer = INT2,
    *,
    fresh: bool = False,
    known: Guard | None = None,
) -> View:
    """What one who knows the guard, or thinks that it is `known`, reads.

    Draws are those of the run or, where `fresh`, of each round.
    """
    received, last = [], None
    for made, secret in enumerate(secrets, 1):
        random = torch.Generator().manual_seed(made if fresh else 0)
        sent: QuantizedTensor = guard.quantize(quantizer, secret, last, random)
        draws = draw(secret.numel(), random.manual_seed(made if fresh else 0))
        cells = (known or guard).cells(sent, last, first=last is None, draws=draws)
        state = {HEAD: (known or guard).dequantize(sent, draws)}
        received.append(Received(made, 3, state, {HEAD: cells}))
        last = sent
    rounds = frozenset(range(1, len(secrets) + 1))
    return View(tuple(received), 4, FakeTools(), {3: rounds})


def error(name: str, view: View, secret: Tensor) -> float:
    found = ATTACKS[name].attack(view)[HEAD]
    return float((found - secret).norm() / secret.norm())


def constant() -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def noisy(rounds: int, size: float) -> list[Tensor]:
    """A constant that the noise of training moves to and fro."""
    random, middle = torch.Generator().manual_seed(1), constant()
    return [middle + size * torch.randn(middle.shape, generator=random) for _ in range(rounds)]


def line(rounds: int) -> list[Tensor]:
    """Values that each go from one uniform draw to another; the first of a block stays the largest:
    its scale is 1."""
    random = torch.Generator().manual_seed(2)
    start, end = (1.8 * torch.rand(32, 64, generator=random) - 0.9 for _ in range(2))
    start[:, 0] = end[:, 0] = 1.0
    return [start + number / (rounds - 1) * (end - start) for number in range(rounds)]


def changes(view: View) -> int:
    """Number of times that a sign changed: with these levels, a code."""
    found = [each.state[HEAD].sign() for each in view.received]
    return sum(int((one != other).sum()) for one, other in pairwise(found))


@pytest.mark.parametrize("rounds", [16, 64])
def test_a_dither_of_each_round_averages_out_as_one_over_the_root_of_the_rounds(
    rounds: int,
) -> None:
    secret = constant()
    view = view_of([secret] * rounds, Guard(dithered=True), fresh=True)
    one = error("last-broadcast", view, secret)
    mean = error("mean-factors", view, secret)
    assert mean == pytest.approx(one / math.sqrt(rounds), rel=0.1)


@pytest.mark.parametrize("guard", [Guard(dithered=True), STILL], ids=["run", "still"])
def test_of_a_constant_many_broadcasts_say_no_more_than_one(guard: Guard) -> None:
    view = view_of([constant()] * 16, guard)
    for each in view.received:
        assert torch.equal(each.state[HEAD], view.last.state[HEAD])
    for name in ("mean-factors", "recent-factors", "trend"):
        found = ATTACKS[name].attack(view)[HEAD]
        torch.testing.assert_close(found, view.last.state[HEAD], rtol=0, atol=1e-5)


def test_what_training_moves_to_and_fro_is_a_dither_that_hysteresis_takes_away() -> None:
    """Noise of a tenth of the spread. Held scales alone do not help: it is the codes that move."""
    secrets, middle = noisy(32, 0.1), constant()
    gains, codes = {}, {}
    for name, guard in {"plain": Guard(), "held": Guard(hold_scales=True), "still": STILL}.items():
        view = view_of(secrets, guard)
        codes[name] = changes(view)
        gains[name] = error("mean-factors", view, middle) / error("last-broadcast", view, middle)
    assert gains["plain"] < 0.9
    assert gains["still"] > 0.99
    assert codes["still"] < codes["plain"] / 20


def test_scales_that_are_held_do_not_follow_the_noise() -> None:
    secrets = noisy(32, 0.1)
    for guard, moved in ((Guard(), True), (Guard(hold_scales=True), False)):
        ends = [each.state[HEAD].abs().amax(1) for each in view_of(secrets, guard).received]
        assert bool((torch.stack(ends).std(0) > 1e-6).all()) is moved


def test_slow_values_still_give_away_when_they_cross_unless_a_dither_hides_where() -> None:
    """The attack that gets through: the error of the newest broadcast is that of a code that lags
    by its margin, and who knows the margin does without it."""
    secrets = line(40)
    views = {
        "plain": view_of(secrets, Guard(), INT3),
        "still": view_of(secrets, STILL, INT3),
        "dithered": view_of(secrets, Guard(dithered=True), INT3),
    }
    last = {name: error("last-broadcast", view, secrets[-1]) for name, view in views.items()}
    found = {name: error("crossings", view, secrets[-1]) for name, view in views.items()}
    assert found["plain"] < 0.75 * last["plain"]
    assert found["still"] < 0.75 * last["still"]
    assert found["dithered"] > last["dithered"]
    others = [
        error(n, views["still"], secrets[-1]) for n in ("trend", "interval", "recent-factors")
    ]
    assert found["still"] < 0.75 * min(others)
    assert found["plain"] < found["still"]


@pytest.mark.parametrize(
    "guard", [STILL, Guard(dithered=True), Guard(magnitude="norm")], ids=["still", "run", "norm"]
)
def test_an_adversary_who_knows_a_defence_is_right_and_one_who_does_not_is_wrong(
    guard: Guard,
) -> None:
    """The interval attack moves its estimate into the cells, where the secret is for certain."""
    secrets = line(40)
    for known, right in ((guard, True), (Guard(), False)):
        view = view_of(secrets, guard, known=known)
        low, high = view.last.cells[HEAD]
        found = ATTACKS["interval"].attack(view)[HEAD]
        assert ((low <= found) & (found <= high)).all()
        outside = (secrets[-1] < low) | (secrets[-1] > high)
        assert float(outside.float().mean()) == 0 if right else outside.float().mean() > 0.05


def test_a_codebook_that_enlarges_is_put_right_by_the_norm() -> None:
    """NF2 makes Gaussian blocks of 64 larger by 8 %, and their error is in part that."""
    quantizer, secret = Quantizer(2, "nf", 64), constant()
    plain = Guard().quantize(quantizer, secret).dequantize()
    kept = Guard(magnitude="norm").quantize(quantizer, secret).dequantize()
    assert float(plain.norm() / secret.norm()) == pytest.approx(1.08, abs=0.01)
    torch.testing.assert_close(kept.norm(dim=1), secret.norm(dim=1), rtol=1e-5, atol=0)
    assert (kept - secret).norm() < 0.97 * (plain - secret).norm()


def test_where_no_code_changes_the_crossings_are_the_newest_broadcast() -> None:
    view = view_of([constant()] * 3, STILL)
    assert torch.equal(ATTACKS["crossings"].attack(view)[HEAD], view.last.state[HEAD])
    one = replace(view, received=view.received[:1])
    assert torch.equal(ATTACKS["crossings"].attack(one)[HEAD], one.last.state[HEAD])
    blind = replace(view, received=tuple(replace(x, cells={}) for x in view.received))
    assert torch.equal(ATTACKS["crossings"].attack(blind)[HEAD], view.last.state[HEAD])


SUBTRACTED, DITHERED = Guard(dithered=True, subtracted=True), Guard(dithered=True)


def independent() -> Tensor:
    """Uniform values of a stream that is none of the draws'."""
    return 2 * torch.rand(256, 64, generator=torch.Generator().manual_seed(99)) - 1


def test_a_subtracted_dither_averages_out_over_rounds_and_not_over_a_run() -> None:
    """A constant, 16 rounds: a mean of 1 / sqrt(16) of the error with a seed for each, to 5 %.

    One step of c is 1 at these levels: the error of a message is sqrt(1 / 12) of c.
    """
    secret = independent()
    c = secret.abs().amax(1, keepdim=True).expand_as(secret)
    single = float((c**2 / 12).sum().sqrt() / secret.norm())
    rounds, once = (view_of([secret] * 16, SUBTRACTED, fresh=fresh) for fresh in (True, False))
    for view in (rounds, once):
        assert error("last-broadcast", view, secret) == pytest.approx(single, rel=0.05)
    assert error("mean-factors", rounds, secret) == pytest.approx(single / 4, rel=0.05)
    assert error("mean-factors", once, secret) == pytest.approx(single, rel=0.05)


def test_who_lacks_the_seed_reads_a_dither_that_is_not_subtracted() -> None:
    """A mean square error of E[f (1 - f)] = 1/6 of a step's, against 1/12: a factor sqrt 2."""
    secret = independent()
    inside, outside = (
        view_of([secret] * 4, SUBTRACTED, known=known) for known in (SUBTRACTED, DITHERED)
    )
    ratio = error("last-broadcast", outside, secret) / error("last-broadcast", inside, secret)
    assert ratio == pytest.approx(2**0.5, rel=0.02)


def test_cells_of_one_who_has_the_seeds_meet_at_the_secret() -> None:
    """Of a constant, over T rounds, in 1 / T: T uniform boundaries leave 2 / (T + 1) of a step."""
    secret = independent()
    c = secret.abs().amax(1, keepdim=True).expand_as(secret)
    widths = {}
    for rounds in (4, 32):
        cells = [
            each.cells[HEAD] for each in view_of([secret] * rounds, SUBTRACTED, fresh=True).received
        ]
        low = torch.stack([low for low, _ in cells]).amax(0)
        high = torch.stack([high for _, high in cells]).amin(0)
        assert ((low <= secret) & (secret <= high)).all()
        far = secret.abs() < 0.5 * c  # elsewhere the largest magnitude bounds it, too
        widths[rounds] = float(((high - low) / c)[far].mean())
    assert widths[4] == pytest.approx(2 / 5, rel=0.1)
    assert widths[32] == pytest.approx(2 / 33, rel=0.1)


def test_cells_of_a_constant_that_meet_say_more_than_any_mean() -> None:
    """The seed of the dither is known, and drawn in each round."""
    secret = independent()
    errors = {}
    for rounds in (8, 32):
        view = view_of([secret] * rounds, SUBTRACTED, fresh=True)
        errors[rounds] = {n: error(n, view, secret) for n in ("intersection", "mean-factors")}
        assert errors[rounds]["intersection"] < 0.75 * errors[rounds]["mean-factors"]
    assert errors[32]["intersection"] < 0.35 * errors[8]["intersection"]  # 1 / T, not 1 / sqrt(T)


def test_cells_that_do_not_meet_are_of_another_value() -> None:
    """Where S has left its old cell, the newest one alone counts."""
    view = view_of(line(12), Guard())
    low, high = view.last.cells[HEAD]
    found = ATTACKS["intersection"].attack(view)[HEAD]
    assert ((low <= found) & (found <= high)).all()


def test_crossings_read_one_edition_of_a_round() -> None:
    """Of two messages of a round there is no rate."""
    view = view_of(line(6), Guard())
    twice = tuple(x for each in view.received for x in (each, each))
    found = ATTACKS["crossings"].attack(replace(view, received=twice))[HEAD]
    assert torch.equal(found, ATTACKS["crossings"].attack(view)[HEAD])
