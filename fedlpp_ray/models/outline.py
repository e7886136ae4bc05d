"""The structure of a model without its weights, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from fedlpp_ray.config import ModelConfig
from fedlpp_ray.models.loading import check_causal, decoding_of, frozen, quiet, reading


def load_outline(config: ModelConfig, num_labels: int | None) -> torch.nn.Module:
    """The same model without weights, on the meta device: enough to check what fits it.

    Args:
        config: Which model.
        num_labels: Number of a classifier's classes. None: the outline of a generator.

    Raises:
        AssetError: as `load_classifier` or `load_generator`, for what is known without weights.
    """
    with reading(config) as (name, options):
        model = _build(name, num_labels, options)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def load_skeleton(config: ModelConfig, num_labels: int | None, pad: int) -> torch.nn.Module:
    """What `load_classifier` or `load_generator` returns, but for its tensors.

    Args:
        config: Which model.
        num_labels: As `load_outline`.
        pad: The tokenizer's padding token.

    Raises:
        AssetError: as `load_outline`.
    """
    with reading(config) as (name, options), quiet():
        model = _build(name, num_labels, options)
        if num_labels is None:
            try:
                own = GenerationConfig.from_pretrained(name, **options)
            except OSError:  # it has no file for them, and its configuration says them
                own = model.generation_config
            model.generation_config = decoding_of(own, pad)
    return frozen(model, pad)


def _build(name: str, num_labels: int | None, options: dict[str, Any]) -> Any:
    classes = {} if num_labels is None else {"num_labels": num_labels}
    kind = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    outline = AutoConfig.from_pretrained(name, **classes, **options)
    if num_labels is None:
        check_causal(outline)
    with torch.device("meta"):
        return kind.from_config(outline, dtype=torch.float32)
