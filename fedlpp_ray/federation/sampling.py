"""Who takes part in a round, and who could make the most of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from fedlpp_ray.config import Experiment, FederationConfig, LoraConfig
from fedlpp_ray.seeds import derive


def sample_cohort(
    config: FederationConfig,
    seed: int,
    round: int,
    sizes: Sequence[int] | None = None,
    count: int | None = None,
    *,
    left_out: Collection[int] = (),
) -> tuple[int, ...]:
    """Clients of a round: `cohort_size` of them without replacement, in ascending order.

    It depends on the seed, the round, who is left out and, weighted, on the sizes.

    Args:
        config: How many are sampled of how many, and whether their sizes count.
        seed: Of the experiment.
        round: From 1.
        sizes: (clients,) number of examples of each, above 0; `federation.sampling` 'examples'
            needs it.
        count: How many, if not `cohort_size`.
        left_out: Clients that are not drawn; at least as many others.

    Raises:
        ValueError: there is not one size for each client.
    """
    purpose = derive(seed, "cohort", round)
    size = config.cohort_size if count is None else count
    if config.sampling == "uniform":
        left: Sequence[int] = range(config.clients)
        if left_out:
            left = [client for client in left if client not in left_out]
        return tuple(sorted(random.Random(purpose).sample(left, size)))
    if sizes is None or len(sizes) != config.clients:
        raise ValueError("federation.sampling 'examples' needs the size of each client")
    # Who comes first, each at a rate of its size: drawing one after the other, each time in
    # proportion to size among those left (Efraimidis and Spirakis, 2006, with -log of their key).
    times = np.random.default_rng(purpose).standard_exponential(config.clients) / np.asarray(sizes)
    times[list(left_out)] = np.inf
    first = np.argpartition(times, size - 1)[:size]
    return tuple(np.sort(first).tolist())


class Cohorts:
    """Who is sampled in each round of an experiment.

    With `federation.max_participations` clients that were sampled so often are left out of what
    `sample_cohort` draws, so that a cohort follows from those before it. All are counted again
    from round 1, whoever asks, so that they follow from the seed and the round alone.

    Args:
        config: As for `sample_cohort`.
        seed: Of the experiment.
        sizes: (clients,) number of examples of each.
        count: How many, if not `cohort_size`. What the limit allows is checked for `sample_size`.
    """

    def __init__(
        self, config: FederationConfig, seed: int, sizes: Sequence[int], count: int | None = None
    ) -> None:
        self._config, self._seed, self._sizes, self._count = config, seed, sizes, count
        self._drawn: list[tuple[int, ...]] = []
        self._often = Counter[int]()
        self._left_out: set[int] = set()

    def of(self, round: int) -> tuple[int, ...]:
        """The clients of a round, from 1, in ascending order."""
        if self._config.max_participations is None:
            return self._sample(round)
        while len(self._drawn) < round:
            self._drawn.append(self._sample(len(self._drawn) + 1))
            self._often.update(self._drawn[-1])
            self._left_out |= {
                client
                for client in self._drawn[-1]
                if self._often[client] == self._config.max_participations
            }
        return self._drawn[round - 1]

    def _sample(self, round: int) -> tuple[int, ...]:
        return sample_cohort(
            self._config, self._seed, round, self._sizes, self._count, left_out=self._left_out
        )


def strongest_client(config: LoraConfig, sizes: Sequence[int]) -> int:
    """The client whose model is measured: of the largest rank the one with the most examples.

    A client of a smaller rank receives a coarser model. Among equals, the lowest number.

    Args:
        config: The clients' ranks.
        sizes: (clients,) number of examples of each.
    """
    ranks = np.resize(config.client_ranks or (config.rank,), len(sizes))
    return int(np.where(ranks == ranks.max(), np.asarray(sizes), -1).argmax())


def colluders(experiment: Experiment, sizes: Sequence[int]) -> tuple[int, ...]:
    """The adversary's clients: the strongest, then those with most examples.

    Among equals the lowest number.

    Args:
        experiment: Says how many.
        sizes: (clients,) number of examples of each.
    """
    strongest = strongest_client(experiment.lora, sizes)
    by_size = np.argsort(-np.asarray(sizes), kind="stable").tolist()
    others = [client for client in by_size if client != strongest]
    return (strongest, *others)[: experiment.adversary.colluders]
