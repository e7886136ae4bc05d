"""What a task is made of: texts with labels, or prompts with references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.errors import UserError

HOLD_OUT_SEED = 0
"""Fixed, so that runs with different seeds are evaluated on the same examples."""

Value = TypeVar("Value")
Indices = NDArray[np.int64]


class TaskError(UserError):
    """The task's data cannot be used; the message says what is wrong and what is needed."""


@dataclass(frozen=True)
class Examples:
    """Texts, their labels, an index into `Task.labels`, and their keys, if any, of equal length."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    keys: tuple[str, ...] | None = None
    """Whose each example is: the value of `task.key_column`."""
    pairs: tuple[str, ...] | None = None
    """The second text of sentence pairs."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Indices) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples(
            _at(self.texts, indices),
            _at(self.labels, indices),
            None if self.keys is None else _at(self.keys, indices),
            None if self.pairs is None else _at(self.pairs, indices),
        )


@dataclass(frozen=True)
class Prompts:
    """Prompts, what to write after each, and whose they are, of equal length."""

    prompts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    """Of a training example exactly one; of a held-out one all that there are, none twice."""
    labels: tuple[int, ...]
    """Indices into `Task.labels`: the number of the key; all 0 where there are no keys."""
    keys: tuple[str, ...] | None = None
    """Whose each example is: the value of `task.key_column`, or the service of `botocore`."""

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int] | Indices) -> Prompts:
        """The examples at `indices`, in that order."""
        return Prompts(
            _at(self.prompts, indices),
            _at(self.references, indices),
            _at(self.labels, indices),
            None if self.keys is None else _at(self.keys, indices),
        )


@dataclass(frozen=True)
class Task:
    """A task: `Examples` if it is classification, `Prompts` if it is generation.

    Attributes:
        labels: Names of the classes; of a generation task the keys, or one name for all.
        train: What the clients share.
        held_out: What models are evaluated on, of the same kind; no client trains on it.
    """

    labels: tuple[str, ...]
    train: Examples | Prompts
    held_out: Examples | Prompts


def _at(values: tuple[Value, ...], indices: Sequence[int] | Indices) -> tuple[Value, ...]:
    return tuple(values[i] for i in indices)
