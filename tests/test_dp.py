"""Clipping, noise and epsilon against their formulas; bounds are of five standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm as normal

from fedlpp_ray.privacy.dp import (
    NoisedMean,
    clipped,
    draw_for,
    epsilon_of,
    next_clip,
    norm,
    update_multiplier,
    with_noise,
)
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import State

NUMBERS = 200_000


def update(size: float, seed: int = 0) -> State:
    """Of two tensors, with this norm over both."""
    draw = torch.Generator().manual_seed(seed)
    both = {"A": torch.randn(3, 40, generator=draw), "head": torch.randn(7, generator=draw)}
    whole = torch.cat([t.flatten() for t in both.values()]).norm()
    return {name: tensor * (size / whole) for name, tensor in both.items()}


def flat(state: State) -> torch.Tensor:
    return torch.cat([t.flatten() for t in state.values()])


@pytest.mark.parametrize("size", [1.5, 3.0, 1e6])
def test_an_update_is_scaled_as_one_vector_to_the_clip(size: float) -> None:
    before, after = flat(update(size)), flat(clipped(update(size), 1.25))
    assert 1.25 * (1 - 1e-6) <= norm(clipped(update(size), 1.25)) <= 1.25
    torch.testing.assert_close(after, before * (1.25 / size), rtol=1e-5, atol=0)


def test_an_update_within_the_clip_keeps_its_bits_and_so_does_one_clipped_before() -> None:
    small = update(1.2)
    assert all(torch.equal(clipped(small, 1.25)[n], small[n]) for n in small)
    once = clipped(update(9.0), 1.25)
    assert all(torch.equal(clipped(once, 1.25)[n], once[n]) for n in once)


def test_what_is_not_finite_is_not_made_finite() -> None:
    broken = {"A": torch.tensor([1.0, math.inf])}
    assert not clipped(broken, 1.0)["A"].isfinite().all()


def near(found: float, expected: float, numbers: int = NUMBERS) -> bool:
    """Of a variance: its standard error is sqrt(2 / numbers) of it."""
    return abs(found / expected - 1) < 5 * math.sqrt(2 / numbers)


def draw(*purpose: int) -> Callable[[str], torch.Generator]:
    return lambda name: generator(0, "noise", *purpose, name)


def test_noise_has_its_variance_and_no_mean() -> None:
    zeros = {"A": torch.zeros(NUMBERS)}
    noise = with_noise(zeros, {"A": 0.7}, draw())["A"]
    assert near(float(noise.double().square().mean()), 0.49)
    assert abs(float(noise.mean())) < 5 * 0.7 / math.sqrt(NUMBERS)
    assert torch.equal(noise, with_noise(zeros, {"A": 0.7}, draw())["A"])
    assert not torch.equal(noise, with_noise(zeros, {"A": 0.7}, draw(1))["A"])


@pytest.mark.parametrize("name", ["A", "B"])
def test_noise_depends_on_every_bit_that_is_noised_and_on_its_size(name: str) -> None:
    values = {"A": torch.zeros(NUMBERS), "B": torch.zeros(2)}
    stds = {"A": 0.7, "B": 0.7}
    other = values | {name: torch.nextafter(values[name], torch.tensor(1.0))}

    def first(values: State, stds: dict[str, float], *purpose: str | int) -> torch.Tensor:
        return with_noise(
            {"A": torch.zeros(NUMBERS)}, {"A": 1.0}, draw_for(values, stds, 0, *purpose)
        )["A"]

    drawn = first(values, stds, "x", 1)
    assert torch.equal(drawn, first(dict(reversed(values.items())), stds, "x", 1))
    for another in (
        first(other, stds, "x", 1),
        first(values, stds | {name: 0.35}, "x", 1),
        first(values, stds, "x", 2),
    ):
        assert abs(float((drawn * another).mean())) < 5 / math.sqrt(NUMBERS)


def test_shares_of_the_fewest_that_return_add_up_to_the_noise_and_more_to_more() -> None:
    z, clip, fewest = 1.3, 0.5, 4
    zeros, std = {"A": torch.zeros(NUMBERS)}, z * clip / math.sqrt(fewest)
    shares = [with_noise(zeros, {"A": std}, draw(client))["A"].double() for client in range(6)]
    assert near(float(sum(shares[:fewest]).square().mean()), (z * clip) ** 2)  # type: ignore[union-attr]
    assert near(float(sum(shares).square().mean()), 6 / 4 * (z * clip) ** 2)  # type: ignore[union-attr]


def test_the_mean_is_over_the_planned_number() -> None:
    mean = {"A": torch.full((NUMBERS,), 6.0, dtype=torch.float64), "dp": torch.zeros(1)}
    found = NoisedMean(mean, share=3 / 4, stds={"A": 0.1}, draw=draw())
    assert list(found) == ["A"]
    moved = found["A"] - 6.0 * 3 / 4
    assert near(float(moved.square().mean()), 0.01)
    assert torch.equal(found["A"], found["A"])
    assert torch.equal(NoisedMean(mean, 1.0, {"A": 0.0}, draw())["A"], mean["A"])


def test_the_clip_falls_where_more_than_the_quantile_are_within_it_and_rises_where_fewer() -> None:
    assert next_clip(2.0, below=1.0, quantile=0.5, lr=0.2) == pytest.approx(2 * math.exp(-0.1))
    assert next_clip(2.0, below=0.0, quantile=0.5, lr=0.2) == pytest.approx(2 * math.exp(0.1))
    assert next_clip(2.0, below=0.5, quantile=0.5, lr=0.2) == 2.0


@pytest.mark.parametrize("first", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_goes_to_the_quantile_of_the_norms(quantile: float, first: float) -> None:
    draws, clip, last = np.random.default_rng(0), first, []
    for _ in range(400):
        norms = draws.lognormal(mean=1.0, sigma=0.5, size=100)
        below = ((norms <= clip).sum() + draws.normal(0, 5)) / 100  # the paper's cohort / 20
        clip = next_clip(clip, below, quantile, lr=0.2)
        last.append(clip)
    within = normal.cdf((math.log(float(np.mean(last[-100:]))) - 1.0) / 0.5)
    assert within == pytest.approx(quantile, abs=0.03)


def test_count_and_updates_together_cost_one_noise_multiplier() -> None:
    assert update_multiplier(1.0, 5.0) == pytest.approx(1 / math.sqrt(0.99))  # of 100 clients
    z = update_multiplier(0.8, 0.5)
    assert z**-2 + (2 * 0.5) ** -2 == pytest.approx(0.8**-2)
    assert update_multiplier(0.0, 5.0) == 0.0
    with pytest.raises(ValueError, match=r"above 0\.5"):
        update_multiplier(1.0, 0.5)


def poisson_rdp(q: float, sigma: float, order: int) -> float:
    """Of the sampled Gaussian mechanism (Mironov, Talwar and Zhang, arXiv 1908.10530, 3.3)."""
    terms = [
        math.comb(order, k)
        * mpmath.mpf(1 - q) ** (order - k)
        * mpmath.mpf(q) ** k
        * mpmath.exp(mpmath.mpf(k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    ]
    return float(mpmath.log(mpmath.fsum(terms)) / (order - 1))


@pytest.mark.parametrize(
    ("sigma", "epochs", "published"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
)
def test_the_accountant_gives_published_values(sigma: float, epochs: int, published: float) -> None:
    """The table of TensorFlow Privacy's tutorial: MNIST, batches of 256, delta 1e-5.

    It is of Poisson samples and of an earlier bound: epsilon = rdp + log(1 / delta) / (order - 1).
    """
    import dp_accounting as dp

    q, steps, orders = 256 / 60_000, epochs * 60_000 // 256, list(range(2, 64))
    rdp = [steps * poisson_rdp(q, sigma, order) for order in orders]
    old = min(r - math.log(1e-5) / (a - 1) for r, a in zip(rdp, orders, strict=True))
    assert old == pytest.approx(published, rel=0.02)  # fractional orders are a little better
    accountant = dp.rdp.RdpAccountant(orders)
    accountant.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(sigma)), steps)
    assert accountant.get_epsilon(1e-5) == pytest.approx(converted(rdp, orders, 1e-5), rel=1e-6)
    assert accountant.get_epsilon(1e-5) < published


def converted(rdp: list[float], orders: list[int], delta: float) -> float:
    """To epsilon (Canonne, Kamath and Steinke, arXiv 2004.00010, Proposition 12)."""
    return min(
        r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for r, a in zip(rdp, orders, strict=True)
    )


def fixed_size_rdp(q: float, sigma: float, order: int) -> float:
    """Of the Gaussian mechanism on a sample without replacement (arXiv 1808.00087, Theorem 27)."""

    def moment(j: int) -> mpmath.mpf:  # e^((j - 1) rdp(j))
        return mpmath.exp(mpmath.mpf(j * (j - 1)) / (2 * sigma**2))

    def difference(n: int) -> mpmath.mpf:
        return mpmath.fsum((-1) ** i * math.comb(n, i) * moment(i) for i in range(n + 1))

    total = mpmath.mpf(1)
    total += q**2 * math.comb(order, 2) * min(4 * (moment(2) - 1), 2 * moment(2))
    for j in range(3, order + 1):
        mixed = 4 * mpmath.sqrt(difference(2 * (j // 2)) * difference(2 * -(-j // 2)))
        total += mpmath.mpf(q) ** j * math.comb(order, j) * min(mixed, 2 * moment(j))
    return float(mpmath.log(total) / (order - 1))


@pytest.mark.parametrize(
    ("clients", "sampled", "z", "rounds"), [(1000, 20, 2.0, 100), (100, 10, 3.0, 50)]
)
def test_epsilon_is_that_of_a_sample_of_fixed_size_and_a_client_replaced(
    clients: int, sampled: int, z: float, rounds: int
) -> None:
    """Against the theorem computed here at whole orders, with noise z C on a change of 2 C."""
    delta, orders = 1e-5, list(range(2, 30))
    with mpmath.workdps(120):
        rdp = [rounds * fixed_size_rdp(sampled / clients, z / 2, order) for order in orders]
    epsilon = epsilon_of(rounds, clients=clients, sampled=sampled, noise_multiplier=z, delta=delta)
    assert epsilon == pytest.approx(converted(rdp, orders, delta), rel=0.02)


def exact_gaussian(rounds: int, z: float, delta: float) -> float:
    """Epsilon of Gaussian mechanisms on a change of 2 C (Balle and Wang, arXiv 1805.06530)."""
    mu = math.sqrt(rounds) * 2 / z

    def excess(e: float) -> float:
        return float(
            normal.cdf(mu / 2 - e / mu) - math.exp(e) * normal.cdf(-mu / 2 - e / mu) - delta
        )

    return float(brentq(excess, 0, 500))


def test_epsilon_of_one_round_of_all_clients_is_close_above_the_published_one() -> None:
    """The analytic Gaussian mechanism (Balle and Wang, ICML 2018): the sigma of their code for
    epsilon 1, delta 1e-5 and sensitivity 1. Ours is 2 C, so z is 2 sigma.

    RDP gives no less than the exact epsilon, and here a tenth more at most.
    """
    z = 2 * 3.730631634816464
    epsilon = epsilon_of(1, clients=20, sampled=20, noise_multiplier=z, delta=1e-5)
    assert 1 <= epsilon < 1.1
    assert exact_gaussian(1, z, 1e-5) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("z", [0.8, 2.0, 8.0])
def test_epsilon_of_all_clients_in_every_round_is_close_above_the_exact_one(z: float) -> None:
    epsilon = epsilon_of(10, clients=20, sampled=20, noise_multiplier=z, delta=1e-5)
    assert 1 <= epsilon / exact_gaussian(10, z, 1e-5) < 1.15


@pytest.mark.parametrize(("clients", "sampled", "z"), [(10, 5, 1.0), (10, 8, 1.5), (4, 2, 4.0)])
def test_no_attack_on_one_round_beats_epsilon(clients: int, sampled: int, z: float) -> None:
    """All others return 0, and the one client C or -C: a loss that is there for certain.

    Were a change of C accounted in the place of 2 C, epsilon would be below it.
    """
    delta, q = 1e-5, sampled / clients
    epsilon = epsilon_of(1, clients=clients, sampled=sampled, noise_multiplier=z, delta=delta)

    def density(x: float, sign: int) -> float:
        return float((1 - q) * normal.pdf(x, 0, z) + q * normal.pdf(x, sign, z))

    def lost(e: float) -> float:
        excess = lambda x: max(0.0, density(x, 1) - math.exp(e) * density(x, -1))  # noqa: E731
        return float(quad(excess, -12 * z, 12 * z + 2, limit=500)[0])

    assert lost(epsilon) <= delta
    assert (
        lost(epsilon_of(1, clients=clients, sampled=sampled, noise_multiplier=2 * z, delta=delta))
        > delta
    )


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_with_clients() -> None:
    def epsilon(rounds: int = 5, clients: int = 200, z: float = 2.0) -> float:
        return epsilon_of(rounds, clients=clients, sampled=10, noise_multiplier=z, delta=1e-4)

    assert epsilon(1) < epsilon(2) < epsilon(5)
    assert epsilon(z=4.0) < epsilon(z=2.0) < epsilon(z=0.3)
    assert epsilon(clients=2000) < epsilon(clients=200)
    assert epsilon(z=0.0) == math.inf
