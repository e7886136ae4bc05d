"""How the training examples lie at the clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.config import FederationConfig
from fedlpp_ray.seeds import derive
from fedlpp_ray.tasks.classification import TaskError

Indices = NDArray[np.int64]
ATTEMPTS = 1000


def partition(labels: Sequence[int], config: FederationConfig, seed: int) -> list[Indices]:
    """Indices of each client's examples: disjoint, together all of them.

    Args:
        labels: The training labels, one an example.
        config: Number of clients, kind of partition, and the fewest examples of a client.
        seed: The partition depends on it alone.

    Raises:
        TaskError: the examples cannot give every client `min_examples`.
    """
    if config.clients * config.min_examples > len(labels):
        raise TaskError(
            f"federation.clients = {config.clients} with at least federation.min_examples = "
            f"{config.min_examples} each need {config.clients * config.min_examples} training "
            f"examples; there are {len(labels)}"
        )
    rng = np.random.default_rng(derive(seed, "partition"))
    return _PARTITIONERS[config.partition](np.asarray(labels), config, rng)


def _iid(labels: Indices, config: FederationConfig, rng: np.random.Generator) -> list[Indices]:
    """Equal shares of a random order."""
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), config.clients)]


def _dirichlet(
    labels: Indices, config: FederationConfig, rng: np.random.Generator
) -> list[Indices]:
    """Each label's examples shared by Dirichlet(alpha) over the clients (Hsu et al., 2019).

    Drawn again until every client has `min_examples`.
    """
    for _ in range(ATTEMPTS):
        clients: list[list[Indices]] = [[] for _ in range(config.clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(config.clients, config.dirichlet_alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in zip(clients, np.split(members, cuts), strict=True):
                client.append(part)
        parts = [np.sort(np.concatenate(client)) for client in clients]
        if min(map(len, parts)) >= config.min_examples:
            return parts
    raise TaskError(
        f"no Dirichlet partition with federation.dirichlet_alpha = {config.dirichlet_alpha} gave "
        f"each of {config.clients} clients {config.min_examples} examples in {ATTEMPTS} draws; "
        "raise dirichlet_alpha, or lower clients or min_examples"
    )


_PARTITIONERS: dict[
    str, Callable[[Indices, FederationConfig, np.random.Generator], list[Indices]]
] = {"iid": _iid, "dirichlet": _dirichlet}
