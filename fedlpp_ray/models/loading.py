"""Pretrained models and tokenizers from the hub, a folder, or an installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from fedlpp_ray.assets import check_sha256, locate
from fedlpp_ray.config import ModelConfig
from fedlpp_ray.seeds import global_seed


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    path = locate(config.name)
    if path is None:
        return config.name, {"revision": config.revision}
    if config.sha256 is not None:
        check_sha256(Path(path) / "model.safetensors", config.sha256)
    return str(path), {}


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        AssetError: a local model is missing or is not the expected one.
        OSError: the hub does not know the name or cannot be reached (from transformers).
    """
    name, options = _source(config)
    return AutoTokenizer.from_pretrained(name, **options)


def load_classifier(config: ModelConfig, num_labels: int, seed: int) -> torch.nn.Module:
    """The model W0 with a new classification head, frozen, fp32, in evaluation mode.

    Parameters that the checkpoint lacks (the head) are drawn from `seed`, so that every process
    has the same ones.

    Raises:
        AssetError, OSError: as `load_tokenizer`.
    """
    name, options = _source(config)
    with _quiet(), global_seed(seed, "model"):
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=num_labels, dtype=torch.float32, **options
        )
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


class _quiet:  # noqa: N801
    """No progress bar and no report of the new head's missing weights: they are expected."""

    def __enter__(self) -> None:
        self._verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        logging.set_verbosity(self._verbosity)
        logging.enable_progress_bar()
