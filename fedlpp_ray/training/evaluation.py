"""Evaluation of a model on held-out data, by the kind of task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from fedlpp_ray.config import Experiment
from fedlpp_ray.privacy import Scores
from fedlpp_ray.tasks import (
    IGNORED,
    UTILITY,
    Batch,
    Encoded,
    Metrics,
    Prompts,
    Wording,
    bleu_addends,
    bleu_of_sums,
    classification_metrics,
    evaluation_batches,
    macro_f1_addends,
    macro_f1_of_sums,
    meteor_scores,
    rouge_l_scores,
    text_metrics,
)
from fedlpp_ray.training.decoding import write
from fedlpp_ray.training.group import ALONE, Group
from fedlpp_ray.training.loss import predictions
from fedlpp_ray.training.losses import target_losses
from fedlpp_ray.training.reading import reading

Evaluator = Callable[[nn.Module, torch.device], Metrics]
"""Measures a model, which is left in evaluation mode."""
Scored = tuple[Metrics, Scores | None]
"""What a model was measured at, and example by example; None where no sums over examples decide the
utility, as those of NIST and CIDEr."""
_BY_TEXT = {"meteor": meteor_scores, "rouge_l": rouge_l_scores}
"""Of each written text; their means are utilities."""
Scorer = Callable[[nn.Module, torch.device], Scored]
"""Measures a model likewise, and each held-out example, in the same order of all models."""


def classification_scorer(
    encoded: Encoded, pad: int, experiment: Experiment, group: Group = ALONE
) -> Scorer:
    """Measures the task's metrics; `utility` is that which the experiment names.

    All are NaN where a logit is not finite: the model has diverged.

    Args:
        encoded: The held-out examples.
        pad: Token id to pad with.
        experiment: Batch size and utility.
        group: Ranks that share the batches; all of them measure at the same time.
    """
    batches = evaluation_batches(encoded, pad, experiment.evaluation.batch_size)

    def measure(model: nn.Module, device: torch.device) -> Scored:
        with reading(model, device):
            logits = group.map(lambda x: predictions(model, x, device)[0].float().cpu(), batches)
        labels = torch.cat([batch["labels"] for batch in batches])
        found = torch.cat(logits)
        metrics, finite = classification_metrics(found, labels), bool(found.isfinite().all())
        guesses, ones = found.argmax(1), np.ones(len(labels))
        if experiment.utility == "accuracy":
            scores = Scores((guesses == labels).double().numpy(), ones)
        else:
            values = macro_f1_addends(guesses.numpy(), labels.numpy(), found.shape[1])
            scores = Scores(values, ones, lambda sums: macro_f1_of_sums(sums[..., :-1]))
        if not finite:
            scores = replace(scores, values=scores.values * math.nan)
        return _checked(metrics, finite, experiment), scores

    return measure


def classification_evaluator(
    encoded: Encoded, pad: int, experiment: Experiment, group: Group = ALONE
) -> Evaluator:
    """`classification_scorer`, whose arguments it takes, without the examples."""
    scorer = classification_scorer(encoded, pad, experiment, group)
    return lambda model, device: scorer(model, device)[0]


def generation_scorer(
    held_out: Prompts, wording: Wording, pad: int, experiment: Experiment, group: Group = ALONE
) -> Scorer:
    """As `generation_evaluator`, whose arguments it takes.

    Of `log_likelihood` a prompt with its references is an example, and their tokens its weight. Of
    BLEU, METEOR and ROUGE-L a written text is one; the weights of words in NIST and CIDEr are of
    the whole corpus, and these have no scores.
    """
    measured = _measured(held_out, wording, pad, experiment, group)
    references = [held_out.references[i] for i in _written(held_out, experiment)]
    name = experiment.utility

    def measure(model: nn.Module, device: torch.device) -> Scored:
        metrics, texts = measured(model, device)
        found: Scores | None = None
        if name == "log_likelihood":
            size = experiment.evaluation.batch_size
            losses = target_losses(model, wording.encode(held_out), pad, device, size)
            found = _likelihoods(losses, list(map(len, held_out.references)))
        elif name == "bleu":
            values, ones = bleu_addends(texts, references), np.ones(len(texts))
            found = Scores(values, ones, lambda sums: bleu_of_sums(sums[..., :-1]))
        elif name in _BY_TEXT:
            found = Scores(_BY_TEXT[name](texts, references), np.ones(len(texts)))
        if found and not math.isfinite(metrics[UTILITY]):
            found = replace(found, values=found.values * math.nan)
        return metrics, found

    return measure


def _likelihoods(losses: Sequence[NDArray[np.float64]], references: Sequence[int]) -> Scores:
    """Of the losses of each reference's tokens, and each prompt's number of references."""
    first = np.cumsum([0, *references])[:-1]
    totals = np.add.reduceat([x.sum() for x in losses], first)
    tokens = np.add.reduceat([float(len(x)) for x in losses], first)
    return Scores(-totals / tokens, tokens)


def generation_evaluator(
    held_out: Prompts,
    wording: Wording,
    pad: int,
    experiment: Experiment,
    group: Group = ALONE,
) -> Evaluator:
    """Measures the references' likelihood, and what the model writes against them.

    `loss` (nats) is the mean over the tokens of all references, the end tokens included,
    `perplexity` its exponential, `log_likelihood` -loss. The metrics of text are those of
    `text_metrics`. All are NaN where the loss is not finite: the model has diverged.

    Args:
        held_out: Prompts with their references.
        wording: Of the model's tokenizer.
        pad: Token id to pad with.
        experiment: Decoding, batch size and utility.
        group: Ranks that share the batches; all of them measure at the same time.
    """
    measured = _measured(held_out, wording, pad, experiment, group)
    return lambda model, device: measured(model, device)[0]


def _measured(
    held_out: Prompts, wording: Wording, pad: int, experiment: Experiment, group: Group
) -> Callable[[nn.Module, torch.device], tuple[Metrics, list[str]]]:
    """`generation_evaluator`, with the texts that were written."""
    size, config = experiment.evaluation.batch_size, experiment.generation
    batches = evaluation_batches(wording.encode(held_out), pad, size)
    written = _written(held_out, experiment)
    prompts = [wording.prompt(held_out.prompts[i]) for i in written]
    references = [held_out.references[i] for i in written]

    def measure(model: nn.Module, device: torch.device) -> tuple[Metrics, list[str]]:
        with reading(model, device):
            found = _likelihood(model, batches, device, group)
            tokens = write(
                model,
                prompts,
                config,
                pad=pad,
                stop=wording.stop,
                batch_size=max(1, size // config.beams),
                device=device,
                group=group,
            )
        finite, texts = math.isfinite(found["loss"]), [wording.read(ids) for ids in tokens]
        if texts:
            found |= text_metrics(texts, references)
        return _checked(found | {"examples": len(held_out)}, finite, experiment), texts

    return measure


def _written(held_out: Prompts, experiment: Experiment) -> range:
    """The examples whose text is written: the first of them."""
    return range(len(held_out))[: experiment.generation.examples]


def mean_loss(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean cross-entropy over all labels, nats: of examples, or of tokens to be written.

    Args:
        model: Left in evaluation mode.
        batches: From `evaluation_batches`.
        device: Where the model is.
    """
    with reading(model, device):
        return float(_likelihood(model, batches, device, ALONE)["loss"])


def _likelihood(
    model: nn.Module, batches: Sequence[Batch], device: torch.device, group: Group
) -> Metrics:
    def measure(batch: Batch) -> tuple[float, int]:
        logits, labels = predictions(model, batch, device)
        known = labels != IGNORED  # of the others' logits, no second copy is made
        logits = logits[known].float()
        return cross_entropy(logits, labels[known], reduction="sum").item(), len(logits)

    found = group.map(measure, batches)
    total, tokens = sum(loss for loss, _ in found), sum(count for _, count in found)
    loss = total / tokens
    return {"log_likelihood": -loss, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _checked(metrics: Metrics, finite: Any, experiment: Experiment) -> Metrics:
    """With the utility; all NaN of a model that has diverged, which else would name one class."""
    metrics = {UTILITY: metrics[experiment.utility], **metrics}
    if finite:
        return metrics
    return {key: math.nan if key != "examples" else value for key, value in metrics.items()}
