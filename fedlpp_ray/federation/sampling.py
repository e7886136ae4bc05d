"""Who takes part in a round, and who could make the most of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from fedlpp_ray.config import Experiment, FederationConfig, LoraConfig
from fedlpp_ray.seeds import derive


def sample_cohort(
    config: FederationConfig,
    seed: int,
    round: int,
    sizes: Sequence[int] | None = None,
    count: int | None = None,
) -> tuple[int, ...]:
    """Clients of a round: `cohort_size` of them without replacement, in ascending order.

    It depends on the seed, the round and, weighted, on the sizes.

    Args:
        config: How many are sampled of how many, and whether their sizes count.
        seed: Of the experiment.
        round: From 1.
        sizes: (clients,) number of examples of each, above 0; `federation.sampling` 'examples'
            needs it.
        count: How many, if not `cohort_size`.

    Raises:
        ValueError: there is not one size for each client.
    """
    purpose = derive(seed, "cohort", round)
    size = config.cohort_size if count is None else count
    if config.sampling == "uniform":
        return tuple(sorted(random.Random(purpose).sample(range(config.clients), size)))
    if sizes is None or len(sizes) != config.clients:
        raise ValueError("federation.sampling 'examples' needs the size of each client")
    # Who comes first, each at a rate of its size: drawing one after the other, each time in
    # proportion to size among those left (Efraimidis and Spirakis, 2006, with -log of their key).
    times = np.random.default_rng(purpose).standard_exponential(config.clients) / np.asarray(sizes)
    first = np.argpartition(times, size - 1)[:size]
    return tuple(np.sort(first).tolist())


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
