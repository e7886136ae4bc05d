"""Teaching a model what others say of texts, whose labels nobody needs to know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax

from fedlpp_ray.config import ClientConfig
from fedlpp_ray.lora import trainable
from fedlpp_ray.tasks import IGNORED, Batch
from fedlpp_ray.training.device import compute_dtype, computing
from fedlpp_ray.training.loss import predictions
from fedlpp_ray.training.reading import reading
from fedlpp_ray.training.rules import constant_descent

TEMPERATURE = 2.0
"""tau, by which the logits of both sides are divided."""


def opinions(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> list[Tensor]:
    """softmax(z / tau) of each batch: (examples, classes), or (tokens to write, vocabulary).

    Args:
        model: Left in evaluation mode.
        batches: From `collate`.
        device: Where the model is.
    """
    with reading(model, device):
        return [softmax(_logits(model, batch, device), -1) for batch in batches]


class Imitation:
    """Trains a model's trainable parameters in place towards probabilities.

    The loss is tau^2 KL(p || q), in nats, the mean over examples or tokens to write (Hinton et al.,
    2015, arXiv 1503.02531): p the teachers' and q the model's softmax(z / tau). *Inferred*: the
    client's optimizer without weight decay, at a constant rate, and no dropout.

    Args:
        model: A classifier or causal language model with adapters.
        config: Its optimizer and learning rate.
        device: Where the model is.
    """

    def __init__(self, model: nn.Module, config: ClientConfig, device: torch.device) -> None:
        self._model, self._device, self._dtype = model, device, compute_dtype(model)
        self._optimizer = constant_descent(config).make(trainable(model), config.lr, 0.0)

    def advance(self, batches: Sequence[Batch], targets: Sequence[Tensor]) -> list[float]:
        """Make a step for each batch; the model is left in evaluation mode.

        Args:
            batches: From `collate`.
            targets: A mean of `opinions` of the same batches.

        Returns:
            The loss of each.
        """
        self._model.eval()
        losses = []
        for batch, target in zip(batches, targets, strict=True):
            with computing(self._dtype, self._device):
                said = log_softmax(_logits(self._model, batch, self._device), -1)
            loss = TEMPERATURE**2 * kl_div(said, target, reduction="batchmean")
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            losses.append(loss.item())
        return losses


def _logits(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """z / tau of what has a label."""
    logits, labels = predictions(model, batch, device)
    return logits[labels != IGNORED].float() / TEMPERATURE
