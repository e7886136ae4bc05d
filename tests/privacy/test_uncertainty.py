"""The bootstrap of protection against scipy's, its coverage, and the interval over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import bootstrap, ttest_1samp

from fedlpp_ray.privacy import Scores, bootstrap_protection, mean_over_seeds, uncertainty
from fedlpp_ray.seeds import derive

GROUPS = {"weak": ["weak"], "strong": ["strong"], "all": ["weak", "strong"]}


def scores(values: NDArray[np.float64]) -> Scores:
    return Scores(values, np.ones(len(values)))


def drawn(rng: np.random.Generator, accuracy: float, size: int = 400) -> Scores:
    return scores((rng.random(size) < accuracy).astype(float))


def models(seed: int, size: int = 400) -> tuple[Scores, dict[str, Scores], dict[str, Scores]]:
    rng = np.random.default_rng(seed)
    attacks = {"weak": drawn(rng, 0.6, size), "strong": drawn(rng, 0.8, size)}
    return drawn(rng, 0.9, size), attacks, {"base": drawn(rng, 0.3, size)}


def test_intervals_are_those_of_scipy() -> None:
    """The same paired statistic, the maximum in each resample anew, by scipy.stats.bootstrap."""
    server, attacks, floor = models(0)
    found = bootstrap_protection(server, attacks, floor, GROUPS, seed=0)
    arrays = [server.values, floor["base"].values, *(x.values for x in attacks.values())]

    def protection(s, f, weak, strong, axis):  # type: ignore[no-untyped-def]
        u, low, a, b = (x.mean(axis) for x in (s, f, weak, strong))
        return (u - np.maximum(a, b)) / (u - low)

    expected = bootstrap(
        arrays, protection, paired=True, vectorized=True, method="percentile", rng=1
    ).confidence_interval
    assert found["all"].low == pytest.approx(expected.low, abs=0.01)
    assert found["all"].high == pytest.approx(expected.high, abs=0.01)
    assert found["all"] == found["strong"]  # the weak one is the stronger in no resample
    assert found["weak"].low is not None
    assert found["strong"].high is not None
    assert found["weak"].low > found["strong"].high


def test_the_interval_holds_the_true_protection_as_often_as_it_says() -> None:
    truth, hits, trials = (0.9 - 0.8) / (0.9 - 0.3), 0, 200
    for seed in range(trials):
        server, attacks, floor = models(seed)
        found = bootstrap_protection(server, attacks, floor, GROUPS, seed=seed, resamples=400)[
            "strong"
        ]
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / trials <= 0.99


def test_of_attacks_that_are_alike_the_maximum_leaves_less_protection_than_each() -> None:
    rng = np.random.default_rng(0)
    attacks = {"weak": drawn(rng, 0.8), "strong": drawn(rng, 0.8)}
    server, floor = drawn(rng, 0.9), {"base": drawn(rng, 0.3)}
    found = bootstrap_protection(server, attacks, floor, GROUPS, seed=0)
    lows = [found[name].low for name in ("weak", "strong")]
    assert found["all"].low is not None
    assert all(low is not None and found["all"].low <= low for low in lows)


def test_of_floors_that_are_alike_the_best_leaves_protection_further_from_zero_than_each() -> None:
    """The denominator shrinks: on the side of more protection where there is some."""
    rng = np.random.default_rng(0)
    server, floors = drawn(rng, 0.9), {"base": drawn(rng, 0.6), "own": drawn(rng, 0.6)}
    for accuracy, side in ((0.75, 1), (0.98, -1)):
        attacks = {"a": drawn(rng, accuracy)}

        def ends(chosen: dict[str, Scores], attacks: dict[str, Scores] = attacks) -> list[float]:
            found = bootstrap_protection(server, attacks, chosen, {"a": ["a"]}, seed=0)["a"]
            assert found.low is not None
            assert found.high is not None
            return [found.low, found.high]

        alone = [ends({name: floor}) for name, floor in floors.items()]
        assert all(
            side * x > side * y for each in alone for x, y in zip(ends(floors), each, strict=True)
        )


def test_the_same_seed_gives_the_same_interval_whatever_else_is_measured() -> None:
    server, attacks, floor = models(3)
    one = bootstrap_protection(
        server, {"weak": attacks["weak"]}, floor, {"weak": ["weak"]}, seed=5, resamples=500
    )
    assert (
        bootstrap_protection(server, attacks, floor, GROUPS, seed=5, resamples=500)["weak"]
        == one["weak"]
    )
    assert (
        bootstrap_protection(server, attacks, floor, GROUPS, seed=6, resamples=500)["weak"]
        != one["weak"]
    )


def test_there_is_none_where_the_server_is_seldom_above_the_floor() -> None:
    rng = np.random.default_rng(0)
    same = drawn(rng, 0.5)
    found = bootstrap_protection(
        same, {"a": same}, {"base": same}, {"a": ["a"]}, seed=0, resamples=200
    )["a"]
    assert (found.low, found.high, found.undefined) == (None, None, 1.0)
    server, attacks, _ = models(0)
    close = {"base": scores(np.roll(server.values, 7))}
    close["base"].values[server.values.argmax()] = 0  # at most one example below the server
    found = bootstrap_protection(server, attacks, close, GROUPS, seed=0, resamples=500)["all"]
    assert found.undefined is not None
    assert 0.05 < found.undefined < 1
    assert found.reason == f"in {found.undefined:.0%} of the resamples protection is undefined"


def test_a_model_that_has_diverged_is_the_strongest_of_none() -> None:
    server, attacks, floor = models(0)
    broken = scores(np.full(400, math.nan))
    found = bootstrap_protection(
        server, {"weak": broken, "strong": attacks["strong"]}, floor, GROUPS, seed=0, resamples=500
    )
    assert found["all"] == found["strong"]
    assert found["weak"].undefined == 1.0
    assert (
        bootstrap_protection(broken, attacks, floor, GROUPS, seed=0, resamples=50)["all"].low
        is None
    )


def test_examples_weigh_what_they_weigh() -> None:
    """Three of an example's tokens are three times the example."""
    found = Scores(np.array([1.0, 0.0]), np.array([3.0, 1.0]))
    assert found.utility == 0.75
    with pytest.raises(ValueError, match="not measured on the same examples"):
        bootstrap_protection(found, {"a": scores(np.ones(2))}, {"b": found}, {"a": ["a"]}, seed=0)


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.1, 0.3, -0.2, 0.25]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_over_seeds(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    alone = mean_over_seeds([0.5])
    assert (alone.mean, alone.low, alone.high) == (0.5, None, None)
    assert mean_over_seeds([0.5, None, 0.1]).mean is None


def test_a_utility_that_is_no_mean_is_computed_anew_in_each_resample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Precision: hits over guesses, both drawn; however many resamples are made at a time."""
    rng = np.random.default_rng(0)

    def precision(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
        return found

    def model(accuracy: float) -> Scores:
        guesses = rng.integers(1, 9, 60)
        values = np.stack([rng.binomial(guesses, accuracy), guesses], axis=1).astype(float)
        return Scores(values, np.ones(60), precision)

    models = [model(x) for x in (0.9, 0.3, 0.7)]
    server, floor, attack = models
    assert server.utility == pytest.approx(server.values[:, 0].sum() / server.values[:, 1].sum())

    def interval() -> tuple[float | None, float | None]:
        found = bootstrap_protection(
            server, {"a": attack}, {"f": floor}, {"a": ["a"]}, seed=0, resamples=300
        )["a"]
        return found.low, found.high

    draw = np.random.default_rng(derive(0, "bootstrap"))
    protections = []
    for _ in range(300):
        taken = np.repeat(np.arange(60), draw.multinomial(60, np.full(60, 1 / 60)))
        sums = [each.values[taken].sum(0) for each in models]
        u, low, a = (hits / guesses for hits, guesses in sums)
        protections.append((u - a) / (u - low))
    expected = pytest.approx(tuple(np.quantile(protections, [0.025, 0.975])))
    assert interval() == expected
    monkeypatch.setattr(uncertainty, "_AT_ONCE", 600)
    assert interval() == expected
