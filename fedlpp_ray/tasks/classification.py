"""Labelled text, split into training and held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlpp_ray.errors import UserError


class TaskError(UserError):
    """The task's data cannot be used; the message says what is wrong and what is needed."""


@dataclass(frozen=True)
class Examples:
    """Texts, their labels, an index into `Task.labels`, and their keys, if any, of equal length."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    keys: tuple[str, ...] | None = None
    """Whose each example is: the value of `task.key_column`."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples(
            tuple(self.texts[i] for i in indices),
            tuple(self.labels[i] for i in indices),
            None if self.keys is None else tuple(self.keys[i] for i in indices),
        )


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        labels: Names of the classes.
        train: What the clients share.
        held_out: What models are evaluated on; no client trains on it.
    """

    labels: tuple[str, ...]
    train: Examples
    held_out: Examples


HOLD_OUT_SEED = 0
"""Fixed, so that runs with different seeds are evaluated on the same examples."""


def make_task(
    texts: Sequence[str], names: Sequence[str], held_out: int, keys: Sequence[str] | None = None
) -> Task:
    """Set `held_out` random examples aside and leave the rest to the clients.

    Raises:
        TaskError: there are not more than `held_out` examples, or fewer than two classes.
    """
    if len(texts) <= held_out:
        raise TaskError(f"task.held_out = {held_out}, but there are only {len(texts)} examples")
    labels, examples = _label(names, texts, keys)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(texts)).tolist()
    return Task(
        labels, train=examples.take(order[held_out:]), held_out=examples.take(order[:held_out])
    )


def make_split_task(
    train: tuple[Sequence[str], Sequence[str]],
    held_out: tuple[Sequence[str], Sequence[str]],
    at_most: int,
    keys: Sequence[str] | None = None,
) -> Task:
    """A task whose data come with a split of their own.

    Args:
        train: Texts and label names.
        held_out: Texts and label names.
        at_most: So many of the held-out examples are used.
        keys: Those of the training examples.

    Raises:
        TaskError: fewer than two classes, or the held-out split has a class the training lacks.
    """
    labels, examples = _label(train[1], train[0], keys)
    if unknown := sorted(set(held_out[1]) - set(labels)):
        raise TaskError(f"held-out labels that training lacks: {', '.join(unknown)}")
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(held_out[0])).tolist()[:at_most]
    index = {label: i for i, label in enumerate(labels)}
    texts = tuple(held_out[0][i] for i in order)
    return Task(labels, examples, Examples(texts, tuple(index[held_out[1][i]] for i in order)))


def _label(
    names: Sequence[str], texts: Sequence[str], keys: Sequence[str] | None
) -> tuple[tuple[str, ...], Examples]:
    labels = tuple(sorted(set(names)))
    if len(labels) < 2:
        raise TaskError(f"classification needs at least two labels, found {len(labels)}")
    index = {label: i for i, label in enumerate(labels)}
    coded = tuple(index[name] for name in names)
    return labels, Examples(tuple(texts), coded, None if keys is None else tuple(keys))
