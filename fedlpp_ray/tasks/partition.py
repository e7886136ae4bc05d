"""How the training examples lie at the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.config import FederationConfig
from fedlpp_ray.seeds import derive
from fedlpp_ray.tasks.examples import Indices, TaskError

SERVER_SEED = 1
"""Fixed, as that of the held-out examples: the server's own are the same whatever the seed."""
ATTEMPTS = 1000
WORK = 10**9
"""Examples and shares that all attempts together draw at most: minutes, then it is refused."""


class Shareable(Protocol):
    """Examples as they are shared out: texts, prompts or tokens."""

    @property
    def labels(self) -> Sequence[int] | NDArray[np.int32]:
        """(examples,) the index of each example's label."""

    @property
    def keys(self) -> Sequence[str] | NDArray[np.int32] | None:
        """(examples,) whose each is, if that is known."""

    def take(self, indices: Sequence[int] | Indices) -> Self:
        """The examples at `indices`, in that order."""

    def __len__(self) -> int: ...


Data = TypeVar("Data", bound=Shareable)


@dataclass(frozen=True, eq=False)
class Partition:
    """Whose each training example is. Two flat arrays, whatever the number of clients.

    Attributes:
        order: (examples,) all indices, client by client and ascending within a client; those that
            no client has come last.
        offsets: (clients + 1,) where each client's indices begin in `order`, and the end.
    """

    order: Indices
    offsets: Indices

    @classmethod
    def of(cls, owners: Indices, clients: int) -> Partition:
        """From the client of each example; `clients` stands for none."""
        sizes = np.bincount(owners, minlength=clients)[:clients]
        return cls(np.argsort(owners, kind="stable"), np.concatenate(([0], np.cumsum(sizes))))

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Indices:
        """(clients,) number of examples of each."""
        return np.diff(self.offsets)

    @property
    def left_out(self) -> int:
        """Number of examples that no client has."""
        return len(self.order) - int(self.offsets[-1])

    def indices(self, client: int) -> Indices:
        """(examples of the client,) ascending, a view.

        Raises:
            IndexError: there is no such client.
        """
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]


def set_aside(train: Data, count: int) -> tuple[Data, Data]:
    """Training examples of the server's own, `server.examples` of them, and those that are left.

    What is left to the clients keeps its order.

    Raises:
        TaskError: none would be left.
    """
    if count >= len(train):
        raise TaskError(
            f"server.examples = {count}, but there are only {len(train)} training examples"
        )
    if count == 0:
        return train.take([]), train
    order = np.random.default_rng(SERVER_SEED).permutation(len(train))
    return train.take(order[:count]), train.take(np.sort(order[count:]))


def share_out(
    train: Data, config: FederationConfig, seed: int, own: int
) -> tuple[Data, Data, Partition]:
    """The server's own examples, the clients', and whose each of these is.

    Args:
        train: All training examples.
        config: As of `partition`.
        seed: As of `partition`; which examples are the server's does not depend on it.
        own: `server.examples`.

    Raises:
        TaskError: as `set_aside` and `partition`.
    """
    servers, clients = set_aside(train, own)
    return servers, clients, partition(clients.labels, config, seed, clients.keys)


def partition(
    labels: Sequence[int] | NDArray[np.int32],
    config: FederationConfig,
    seed: int,
    keys: Sequence[str] | NDArray[np.int32] | None = None,
) -> Partition:
    """Give each client its examples: at least `min_examples`, none to two clients.

    Args:
        labels: The training labels, one an example.
        config: Number of clients, kind of partition, and the fewest examples of a client.
        seed: All that is random depends on it alone.
        keys: Whose each example is, for `natural`: names, or numbers in the names' order.

    Raises:
        TaskError: the examples cannot give every client `min_examples`, there are no keys for
            `natural`, or fewer than two labels for `dirichlet`.
    """
    if config.clients * config.min_examples > len(labels):
        raise TaskError(
            f"federation.clients = {config.clients} with at least federation.min_examples = "
            f"{config.min_examples} each need {config.clients * config.min_examples} training "
            f"examples; there are {len(labels)}"
        )
    rng = np.random.default_rng(derive(seed, "partition"))
    match config.partition:
        case "iid":
            owners = _iid(len(labels), config, rng)
        case "dirichlet":
            owners = _dirichlet(np.asarray(labels), config, rng)
        case "quantity":
            owners = _quantity(len(labels), config, rng)
        case "natural":
            owners = _natural(keys, config)
    return Partition.of(owners, config.clients)


# Each returns the client of every example, (examples,).


def _iid(examples: int, config: FederationConfig, rng: np.random.Generator) -> Indices:
    """Equal shares of a random order; where that leaves a rest, one more for the first clients."""
    share, rest = divmod(examples, config.clients)
    sizes = np.full(config.clients, share)
    sizes[:rest] += 1
    return _shuffled(sizes, rng.permutation(examples))


def _quantity(examples: int, config: FederationConfig, rng: np.random.Generator) -> Indices:
    """Random shares, their sizes by Dirichlet(alpha) (quantity skew; Li et al., 2022, NIID-Bench).

    What is beyond `min_examples` for each client is shared so, hence no draw is refused.
    """
    order = rng.permutation(examples)
    sizes = _dirichlet_sizes(examples - config.clients * config.min_examples, config, rng)
    return _shuffled(sizes + config.min_examples, order)


def _shuffled(sizes: Indices, order: Indices) -> Indices:
    """The first `sizes[0]` of the order are the first client's, and so on."""
    owners = np.empty(len(order), np.int64)
    owners[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owners


def _dirichlet_sizes(total: int, config: FederationConfig, rng: np.random.Generator) -> Indices:
    """(clients,) whole numbers that add up to `total`, in Dirichlet(alpha) proportions."""
    shares = rng.dirichlet(np.full(config.clients, config.dirichlet_alpha))
    cuts = np.round(np.cumsum(shares)[:-1] * total).astype(np.int64)
    return np.diff(cuts, prepend=0, append=total)


def _dirichlet(labels: Indices, config: FederationConfig, rng: np.random.Generator) -> Indices:
    """Each label's examples shared by Dirichlet(alpha) over the clients (Hsu et al., 2019).

    Drawn again until every client has `min_examples`.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise TaskError(
            "federation.partition = 'dirichlet' shares out each label unevenly, and all training "
            "examples have one and the same. The labels of a generation task are the values of "
            "task.key_column: name a column of several; or use 'iid' or 'quantity'"
        )
    owners = np.empty(len(labels), np.int64)
    attempts = min(ATTEMPTS, 1 + WORK // (len(labels) + config.clients * len(classes)))
    for _ in range(attempts):
        for label in classes:
            members = rng.permutation(np.flatnonzero(labels == label))
            sizes = _dirichlet_sizes(len(members), config, rng)
            owners[members] = np.repeat(np.arange(config.clients), sizes)
        if np.bincount(owners, minlength=config.clients).min() >= config.min_examples:
            return owners
    raise TaskError(
        f"no Dirichlet partition with federation.dirichlet_alpha = {config.dirichlet_alpha} gave "
        f"each of {config.clients} clients {config.min_examples} examples in {attempts} draws; "
        "raise dirichlet_alpha, or lower clients or min_examples"
    )


def _natural(keys: Sequence[str] | NDArray[np.int32] | None, config: FederationConfig) -> Indices:
    """A client is a key: the `clients` keys with most examples, numbered in the keys' order.

    Among equals the first key goes before. The other keys' examples are left out.
    """
    if keys is None:
        raise TaskError(
            "federation.partition = 'natural' needs task.key_column, the column that says whose "
            "each example is; 'trec' has none, and 'botocore' needs none"
        )
    codes, names = _numbered(keys)
    sizes = np.bincount(codes)
    enough = int((sizes >= config.min_examples).sum())
    if enough < config.clients:
        raise TaskError(
            f"federation.clients = {config.clients}, but of the {len(names)} values of "
            f"task.key_column only {enough} have federation.min_examples = "
            f"{config.min_examples} training examples; lower clients or min_examples"
        )
    kept = np.sort(np.argsort(-sizes, kind="stable")[: config.clients])
    client_of = np.full(len(names), config.clients)
    client_of[kept] = np.arange(config.clients)
    owners: Indices = client_of[codes]
    return owners


def _numbered(
    keys: Sequence[str] | NDArray[np.int32],
) -> tuple[NDArray[Any], Sequence[str] | NDArray[Any]]:
    """The number of each key among the different ones in order, and these."""
    if isinstance(keys, np.ndarray):
        different, codes = np.unique(keys, return_inverse=True)
        return codes, different
    names = sorted(set(keys))
    index = {name: number for number, name in enumerate(names)}
    return np.fromiter(map(index.__getitem__, keys), np.int64, len(keys)), names
