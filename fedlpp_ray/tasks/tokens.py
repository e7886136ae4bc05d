"""Tokenized examples in flat arrays, which processes of a node share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlpp_ray.tasks.batches import IGNORED, Encoded, Label
from fedlpp_ray.tasks.examples import Indices

Example = tuple[Tensor, Label]


class Tokens(Sequence[Example]):
    """Examples as `encode` and `Wording.encode` make them, read from flat arrays one by one.

    Args:
        arrays: `ids` (tokens of all examples,) int32; `offsets` (examples + 1,) int64, where each
            begins, and the end; `labels` (examples,) int32; of sentence pairs `types` like `ids`,
            uint8; of texts to be written `asked` (examples,) int32, the tokens of each prompt; and
            `keys` (examples,) int32, where there are any: whose each is.
        rows: Which of these examples, in which order. None: all.
    """

    def __init__(self, arrays: Mapping[str, Tensor], rows: Indices | None = None) -> None:
        self._arrays, self._rows = dict(arrays), rows

    @property
    def labels(self) -> NDArray[np.int32]:
        """(examples,) the index of each example's label among the task's."""
        return self._of_rows("labels")

    @property
    def keys(self) -> NDArray[np.int32] | None:
        """(examples,) whose each is: numbers in the order of the keys' names. None: no keys."""
        return self._of_rows("keys") if "keys" in self._arrays else None

    def take(self, indices: Sequence[int] | Indices) -> Tokens:
        """The examples at `indices`, in that order; nothing is copied but their numbers."""
        rows = np.asarray(indices, np.int64)
        return Tokens(self._arrays, rows if self._rows is None else self._rows[rows])

    def __len__(self) -> int:
        return len(self._arrays["labels"] if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Tokens: ...
    def __getitem__(self, index: int | slice) -> Example | Tokens:
        """An example, or several."""
        found = range(len(self))[index]
        if isinstance(found, range):
            return self.take(list(found))
        return self._example(found if self._rows is None else int(self._rows[found]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def _example(self, row: int) -> Example:
        arrays = self._arrays
        first, last = arrays["offsets"][row : row + 2].tolist()
        ids = arrays["ids"][first:last].long()
        if "asked" in arrays:
            labels = ids.clone()
            labels[: int(arrays["asked"][row])] = IGNORED
            return ids, labels
        if "types" in arrays:
            ids = torch.stack([ids, arrays["types"][first:last].long()])
        return ids, int(arrays["labels"][row])

    def _of_rows(self, name: str) -> NDArray[np.int32]:
        values: NDArray[np.int32] = self._arrays[name].numpy()
        return values if self._rows is None else values[self._rows]


def pack(
    chunks: Iterable[Encoded], labels: Sequence[int], keys: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The arrays of `Tokens`.

    Args:
        chunks: All examples, some at a time, so that few are held in both forms.
        labels: The index of each example's label.
        keys: Whose each is.
    """
    parts: dict[str, list[Tensor]] = {"ids": [], "lengths": [torch.zeros(1, dtype=torch.int64)]}
    for chunk in chunks:
        for name, values in _flat(chunk).items():
            parts.setdefault(name, []).append(values)
    joined = {name: torch.cat(values or [torch.empty(0)]) for name, values in parts.items()}
    joined["offsets"] = joined.pop("lengths").cumsum(0)
    joined["labels"] = torch.tensor(labels, dtype=torch.int32)
    if keys is not None:
        index = {key: number for number, key in enumerate(sorted(set(keys)))}
        joined["keys"] = torch.tensor([index[key] for key in keys], dtype=torch.int32)
    return joined


def _flat(chunk: Encoded) -> dict[str, Tensor]:
    rows = [x if x.ndim == 2 else x[None] for x, _ in chunk]
    found = {
        "ids": torch.cat([x[0] for x in rows]).int(),
        "lengths": torch.tensor([x.shape[1] for x in rows]),
    }
    if len(rows[0]) == 2:
        found["types"] = torch.cat([x[1] for x in rows]).to(torch.uint8)
    written = [label for _, label in chunk if isinstance(label, Tensor)]
    if written:
        asked = [int((label == IGNORED).sum()) for label in written]
        found["asked"] = torch.tensor(asked, dtype=torch.int32)
    return found
