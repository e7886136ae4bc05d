"""Metrics by name, and those of a classification task."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlpp_ray.config import Kind

Metrics = dict[str, float]
UTILITY = "utility"
"""Name, beside the metrics, of the main one: the U of the method; more is better."""
TEXT_MEASURES = ("bleu", "nist", "meteor", "rouge_l", "cider")
MEASURES: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "generation": (*TEXT_MEASURES, "log_likelihood", "perplexity", "loss"),
}
"""Names of the metrics of each kind of task."""


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Accuracy, macro F1 over the classes, mean cross-entropy in nats, and number of examples.

    Args:
        logits: (examples, classes), float.
        labels: (examples,), int64.
    """
    from sklearn.metrics import f1_score  # a second to import, and not every process measures

    predictions = logits.argmax(1)
    return {
        "accuracy": (predictions == labels).double().mean().item(),
        "macro_f1": float(
            f1_score(
                labels.numpy(),
                predictions.numpy(),
                labels=torch.arange(logits.shape[1]).numpy(),
                average="macro",
                zero_division=0,
            )
        ),
        "loss": cross_entropy(logits.double(), labels).item(),
        "examples": len(labels),
    }


def macro_f1_addends(
    predictions: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """What each example adds to the counts that decide macro F1: hits by class, then mentions.

    Args:
        predictions: (examples,).
        labels: (examples,). Of a class an example's label and its prediction are a mention each.
        classes: How many.

    Returns:
        (examples, 2 classes).
    """
    given, wanted = (np.eye(classes)[each] for each in (predictions, labels))
    return np.concatenate([given * wanted, given + wanted], axis=1)


def macro_f1_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Macro F1 (...,) of sums (..., 2 classes); 0 of a class without a mention."""
    hits, mentions = np.split(sums, 2, axis=-1)
    found: NDArray[np.float64] = (2 * hits / np.where(mentions == 0, 1, mentions)).mean(-1)
    return found
