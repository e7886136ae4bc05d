"""Adapters on a frozen model."""

from __future__ import annotations

import warnings

import peft
from torch import nn

from fedlpp_ray.config import LoraConfig
from fedlpp_ray.errors import UserError
from fedlpp_ray.models import head_modules
from fedlpp_ray.seeds import global_seed


class LoraError(UserError):
    """The adapter does not fit the model."""


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Wrap a frozen sequence classifier with LoRA; the whole classification head is trained too.

    An adapted layer computes h = W0 x + (alpha/r) B A x with A (r, d_in), B (d_out, r), B = 0.

    Args:
        model: The base, of any format in `fedlpp_ray.models`.
        config: Rank, alpha, dropout and target modules.
        seed: A's initial values depend on it alone.

    Raises:
        LoraError: `config.targets` match no module, or are None and PEFT knows no default for
            this architecture.
    """
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=None if config.targets is None else list(config.targets),
        modules_to_save=head_modules(model),  # PEFT alone would train its last layer only
    )
    try:
        with global_seed(seed, "lora"), warnings.catch_warnings():
            # PEFT reads a property of transformers that the next release renames.
            warnings.filterwarnings("ignore", category=FutureWarning)
            return peft.get_peft_model(model, lora)
    except ValueError as error:
        raise LoraError(
            f"lora.targets = {lora.target_modules and sorted(lora.target_modules)}: {error} "
            f"This model's linear layers: {', '.join(_linear_names(model))}"
        ) from error


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers, each once."""
    names = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
