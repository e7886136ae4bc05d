"""The loss of both kinds of task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlpp_ray.tasks import IGNORED, Batch


def predictions(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, and the labels that they are to meet, on `device`.

    Of a text to be written, a token's logits are to meet the next token; the logits of columns
    that no text of the batch has a label for (those of all prompts) are left out, and where the
    model can (`logits_to_keep` in transformers) its language head does not compute them.

    Args:
        model: A classifier or causal language model.
        batch: From `collate`.
        device: Where the model is.

    Returns:
        (examples, classes) and (examples,); or (examples, columns, vocabulary) and
        (examples, columns) with IGNORED where nothing is to be learnt.
    """
    found: Any = model
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if labels.dim() == 1:
        return found(**inputs).logits, labels.to(device)
    labels = labels[:, 1:]
    columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
    labels, columns = labels[:, columns].to(device), columns.to(device)
    own = getattr(model, "get_base_model", lambda: model)()  # within PEFT's
    if "logits_to_keep" in _arguments(type(own).forward):
        return found(**inputs, logits_to_keep=columns).logits, labels
    return found(**inputs).logits[:, columns], labels


def smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy in nats, of the examples or of the tokens that have a label.

    With smoothing 0 it is the loss of transformers' models.

    Args:
        logits: (..., classes).
        labels: (...), with IGNORED where nothing is to be learnt.
        smoothing: Share of the target's probability that is spread over all classes (Szegedy et
            al., arXiv 1512.00567, section 7).
    """
    logits = logits.float().flatten(0, -2)
    return cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
