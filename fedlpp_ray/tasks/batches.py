"""Tokenized text and padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedlpp_ray.tasks.examples import Examples

Batch = dict[str, Tensor]
"""input_ids, attention_mask and, of sentence pairs, token_type_ids (batch, tokens); labels (batch)
or, of texts to be written, (batch, tokens); all int64."""
Label = int | Tensor
"""A class; or, of a text to be written, (tokens,) int64 with IGNORED at those of the prompt."""
Encoded = Sequence[tuple[Tensor, Label]]
"""Token ids (tokens,) and the label of each example. Of sentence pairs whose tokenizer tells them
apart (2, tokens): below the ids, 0 in the first text and 1 in the second."""
IGNORED = -100
"""The label of a token that is not to be learnt."""


def encode(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenize once, cut to `max_length` tokens, unpadded.

    Of a pair the longer text is cut first. What stands between the two is the tokenizer's choice:
    BERT's and RoBERTa's put separators, GPT-2's puts nothing.
    """
    second = () if examples.pairs is None else (list(examples.pairs),)
    found = tokenizer(list(examples.texts), *second, truncation=True, max_length=max_length)
    tokens = found["input_ids"]
    if second and "token_type_ids" in found:  # of a single text all are 0, as models take them
        tokens = zip(tokens, found["token_type_ids"], strict=True)
    return [
        (torch.tensor(x, dtype=torch.int64), label)
        for x, label in zip(tokens, examples.labels, strict=True)
    ]


def collate(encoded: Encoded, pad: int) -> Batch:
    """Pad on the right to the longest of the batch."""
    rows = [x if x.ndim == 2 else x[None] for x, _ in encoded]
    ids = [x[0] for x in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": _join([label for _, label in encoded]),
    }
    if len(rows[0]) == 2:
        batch["token_type_ids"] = pad_sequence([x[1] for x in rows], batch_first=True)
    return batch


def _join(labels: Sequence[Label]) -> Tensor:
    texts = [label for label in labels if isinstance(label, Tensor)]
    if texts:
        return pad_sequence(texts, batch_first=True, padding_value=IGNORED)
    return torch.tensor(labels)


def epoch_order(
    encoded: Encoded, size: int, random: torch.Generator, *, by_length: bool = False
) -> list[int]:
    """Every example once, in random order; each `size` of them in turn are a batch.

    Args:
        encoded: The examples.
        size: Of a batch; the last may be short.
        random: What the order is drawn from.
        by_length: Batches of about the same length: as transformers' LengthGroupedSampler, a random
            order is cut in pieces of up to 50 batches, at least 4 pieces where there are that
            many batches, and each is sorted. Unlike there, the order of batches is random.
    """
    order: list[int] = torch.randperm(len(encoded), generator=random).tolist()
    if not by_length:
        return order
    piece = size * max(1, min(len(order) // (4 * size), 50))
    grouped: list[int] = []
    for start in range(0, len(order), piece):
        grouped += sorted(order[start : start + piece], key=lambda i: encoded[i][0].shape[-1])
    whole = len(order) // size
    batches = [grouped[i * size : (i + 1) * size] for i in range(whole)]
    mixed = torch.randperm(whole, generator=random).tolist()
    return [i for batch in mixed for i in batches[batch]] + grouped[whole * size :]


def evaluation_batches(encoded: Encoded, pad: int, size: int) -> list[Batch]:
    """All examples once, shortest first, so that little is spent on padding."""
    ordered = sorted(encoded, key=lambda example: example[0].shape[-1])
    return [collate(ordered[i : i + size], pad) for i in range(0, len(ordered), size)]
