"""The loss of every single target of every text, which attacks on a model read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from fedlpp_ray.privacy import Losses
from fedlpp_ray.tasks import IGNORED, Batch, Encoded, collate
from fedlpp_ray.training.loss import predictions
from fedlpp_ray.training.reading import reading


def target_losses(
    model: nn.Module, examples: Encoded, pad: int, device: torch.device, batch_size: int
) -> Losses:
    """The cross-entropy of each text's targets, without smoothing.

    The same bits every time with the same batches. In other batches sums are taken in another
    order: in fp32 losses then differ by rounding, by 1e-5 at most on the models of the tests.

    Args:
        model: A classifier or causal language model, with adapters or without; left in evaluation
            mode.
        examples: As training takes them. The targets are the class, (1,); or the tokens that are
            to be written, in their order, without the prompt's.
        pad: Token id to pad with.
        device: Where the model is.
        batch_size: Texts at a time; those of about the same length are together.

    Returns:
        One array for each text, in the order of the examples; not finite where the model has
        diverged.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i][0].shape[-1])
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found: dict[int, NDArray[np.float64]] = {}
    with reading(model, device):
        for chunk in chunks:
            batch = collate([examples[i] for i in chunk], pad)
            found |= dict(zip(chunk, _of_batch(model, batch, device), strict=True))
    return [found[i] for i in range(len(examples))]


def _of_batch(model: nn.Module, batch: Batch, device: torch.device) -> Losses:
    logits, labels = predictions(model, batch, device)
    labels = labels.view(len(labels), -1)
    known = labels != IGNORED
    chosen = logits.view(*labels.shape, -1)[known].float()
    losses = cross_entropy(chosen, labels[known], reduction="none").double().cpu().numpy()
    return list(np.split(losses, known.sum(1).cumsum(0).tolist()[:-1]))
