"""How sure a protection is: over the held-out examples, and over seeds.

Over examples it is the paired percentile bootstrap (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13): each resample takes the same examples for the server, all attacks and
the floor, and chooses the strongest attack and the best floor anew. The maximum of noisy utilities
is above their true maximum: over attacks that is an error on the side of less protection; over
floors it makes the denominator smaller and |protection| larger, which is more protection where it
is positive. Each is small where one of them is clearly the best.

A utility need be no mean: of one that sums over examples decide, such as corpus BLEU, each resample
sums anew (Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.seeds import derive

CONFIDENCE = 0.95
RESAMPLES = 10_000
_AT_ONCE = 2_000_000
"""Numbers drawn at a time, which bounds the memory."""


def weighted_mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of sums (..., 2): of values times weights, and of weights."""
    found: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
    return found


@dataclass(frozen=True, eq=False)
class Scores:
    """What each example adds to a model's utility.

    Attributes:
        values: (examples,) or (examples, k) float64, e.g. 1 where the label is right and 0 else;
            NaN of a model that has diverged.
        weights: (examples,) float64, e.g. 1, or the tokens of each text. The same for all models.
        of_sums: Utilities (...,) of sums (..., k + 1) over examples: of values times weights, and
            of weights. The weighted mean where k is 1.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    of_sums: Callable[[NDArray[np.float64]], NDArray[np.float64]] = weighted_mean

    @property
    def addends(self) -> NDArray[np.float64]:
        """(examples, k + 1): what is summed."""
        values = self.values.reshape(len(self.weights), -1)
        return np.column_stack([values * self.weights[:, None], self.weights])

    @property
    def utility(self) -> float:
        """Of all examples, each once."""
        return float(self.of_sums(self.addends.sum(0)))


@dataclass(frozen=True)
class Interval:
    """Where a protection lies with `CONFIDENCE`.

    Attributes:
        low, high: Its ends; None where there is none.
        undefined: The share of resamples in which protection is undefined, because the server is
            not above the floor. None where nothing was resampled.
        reason: Why there is no interval, or None.
    """

    low: float | None
    high: float | None
    undefined: float | None = None
    reason: str | None = None


def bootstrap_protection(
    server: Scores,
    attacks: Mapping[str, Scores],
    floor: Mapping[str, Scores],
    groups: Mapping[str, Collection[str]],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """The interval of protection against the strongest of each group of attacks.

    Where protection is undefined in more than 1 - `CONFIDENCE` of the resamples, too few are left
    to hold so much of them, and there is no interval.

    Args:
        server: Of the server's final model.
        attacks: By name.
        floor: What a client has without taking part, by name. At least one.
        groups: By name, names of attacks; at least one each.
        seed: The resamples depend on it and the number of examples alone.
        resamples: How many.

    Raises:
        ValueError: the models were not measured on the same examples.
    """
    names = list(attacks)
    models = [server, *floor.values(), *attacks.values()]
    if any(not np.array_equal(model.weights, server.weights) for model in models):
        raise ValueError("the models were not measured on the same examples")
    found = np.concatenate(list(_resampled(models, seed, resamples)))
    own, highest = found[:, 0], np.fmax.reduce(found[:, 1 : 1 + len(floor)], axis=1)
    attacked = found[:, 1 + len(floor) :]
    with np.errstate(invalid="ignore", divide="ignore"):
        advantage = np.where(own > highest, own - highest, np.nan)
    return {
        group: _interval(
            (own - np.fmax.reduce(attacked[:, [names.index(n) for n in chosen]], axis=1))
            / advantage
        )
        for group, chosen in groups.items()
    }


def _resampled(
    models: Sequence[Scores], seed: int, resamples: int
) -> Iterator[NDArray[np.float64]]:
    """Utilities (resamples, models), some resamples at a time."""
    random = np.random.default_rng(derive(seed, "bootstrap"))
    addends = [model.addends for model in models]
    examples, widest = len(addends[0]), max(each.shape[1] for each in addends)
    step = max(1, _AT_ONCE // max(examples, widest))
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        counts = random.multinomial(examples, np.full(examples, 1 / examples), size=size)
        counts = counts.astype(np.float64)
        pairs = zip(models, addends, strict=True)
        yield np.stack([model.of_sums(counts @ each) for model, each in pairs], axis=1)


def _interval(protections: NDArray[np.float64]) -> Interval:
    defined = protections[~np.isnan(protections)]
    undefined = 1 - len(defined) / len(protections)
    if undefined > 1 - CONFIDENCE:
        share = f"in {undefined:.0%} of the resamples protection is undefined"
        return Interval(None, None, undefined, share)
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high), undefined)


@dataclass(frozen=True)
class SeedMean:
    """A quantity over runs that differ in their seed alone.

    Attributes:
        values: Of each run; None where it is undefined.
        mean: None where it is undefined in a run.
        low, high: The ends of the interval of Student's t around the mean, of `CONFIDENCE`; None
            likewise, and of a single run.
    """

    values: tuple[float | None, ...]
    mean: float | None
    low: float | None
    high: float | None


def mean_over_seeds(values: Sequence[float | None]) -> SeedMean:
    """The mean of runs with different seeds, and its interval.

    Args:
        values: One a run, at least one; None or NaN where it is undefined.
    """
    from scipy.stats import t  # a second to import, and a run has no use for it

    known = [x for x in values if x is not None and math.isfinite(x)]
    if len(known) < len(values):
        return SeedMean(tuple(values), None, None, None)
    mean, count = math.fsum(known) / len(known), len(known)
    if count == 1:
        return SeedMean(tuple(values), mean, None, None)
    error = float(np.std(known, ddof=1)) / math.sqrt(count)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return SeedMean(tuple(values), mean, mean - reach, mean + reach)
