"""Adapters on a frozen model."""

from __future__ import annotations

import peft
from torch import nn

from fedlpp_ray.config import LoraConfig
from fedlpp_ray.seeds import global_seed


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Wrap a frozen sequence classifier with LoRA; the classification head is trained too.

    An adapted layer computes h = W0 x + (alpha/r) B A x with A (r, d_in), B (d_out, r), B = 0.

    Args:
        model: The base, of any format in `fedlpp_ray.models`.
        config: Rank, alpha, dropout and target modules.
        seed: A's initial values depend on it alone.

    Raises:
        ValueError: `config.targets` match no module, or PEFT knows no default for this
            architecture (from PEFT, naming the targets).
    """
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=None if config.targets is None else list(config.targets),
    )
    with global_seed(seed, "lora"):
        return peft.get_peft_model(model, lora)
