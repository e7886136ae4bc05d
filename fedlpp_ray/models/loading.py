"""Pretrained models and tokenizers from the hub, a folder, or an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from fedlpp_ray.assets import AssetError, check_sha256, locate
from fedlpp_ray.config import ModelConfig
from fedlpp_ray.models.head import head_modules
from fedlpp_ray.seeds import global_seed


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        AssetError: the model is missing, is not the expected one, or the hub cannot be reached.
    """
    with _reading(config) as (name, options):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:  # decoders: padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(config: ModelConfig, num_labels: int, seed: int) -> torch.nn.Module:
    """The model W0 with a classification head, frozen, fp32, in evaluation mode.

    Parameters that the checkpoint lacks (the head) are drawn from `seed`, so that every process
    has the same ones; so is a head that the checkpoint has for another number of labels.

    Raises:
        AssetError: as `load_tokenizer`; or weights of the backbone have other shapes than its
            configuration says.
    """
    with _reading(config) as (name, options), _quiet(), global_seed(seed, "model"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=num_labels,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    head = head_modules(model)
    mismatched = [
        key for key, *_ in loading["mismatched_keys"] if key.partition(".")[0] not in head
    ]
    if mismatched:
        raise AssetError(
            f"model.name = '{config.name}': other shapes than its config.json says: "
            f"{', '.join(sorted(mismatched)[:5])}"
        )
    if model.config.pad_token_id is None:  # decoders look for the last token before it
        end = model.config.eos_token_id  # some models name several
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def load_outline(config: ModelConfig, num_labels: int) -> torch.nn.Module:
    """The same model without weights, on the meta device: enough to check what fits it.

    Raises:
        AssetError: as `load_tokenizer`.
    """
    with _reading(config) as (name, options):
        outline = AutoConfig.from_pretrained(name, num_labels=num_labels, **options)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(outline)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


@contextmanager
def _reading(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where to load from and with which options; checks the file and names a failure."""
    path = locate(config.name)
    if path is not None and config.sha256 is not None:
        check_sha256(path / "model.safetensors", config.sha256)
    try:
        yield (str(path), {}) if path else (config.name, {"revision": config.revision})
    except (OSError, ValueError) as error:
        raise AssetError(f"model.name = '{config.name}': {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of the new head's missing weights: they are expected."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
