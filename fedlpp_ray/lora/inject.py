"""Adapters on a frozen model."""

from __future__ import annotations

import warnings

import peft
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.config import LoraConfig
from fedlpp_ray.errors import UserError
from fedlpp_ray.models import head_modules
from fedlpp_ray.seeds import global_seed

TARGETS = {
    "albert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "xlnet": ["rel_attn.q", "rel_attn.v"],
}
"""Adapted modules of architectures for which PEFT has no default, as it chooses for their kin."""


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
        LoraError: `config.targets` match no module, or are None and there is no default for this
            architecture; or the rank is above the smaller side of an adapted layer.
    """
    largest = max(map(_smaller_side, _linears(model).values()))
    if config.rank > largest:  # before anything of that size is made
        raise LoraError(f"lora.rank = {config.rank}: this model's layers allow at most {largest}")
    architecture = str(getattr(model.config, "model_type", ""))
    targets = TARGETS.get(architecture) if config.targets is None else list(config.targets)
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=head_modules(model),  # PEFT alone would train its last layer only
    )
    try:
        with global_seed(seed, "lora"), warnings.catch_warnings():
            # PEFT reads a property of transformers that the next release renames.
            warnings.filterwarnings("ignore", category=FutureWarning)
            # It sets this by the layer, and says so of every Conv1D, whose A and B are a Linear's.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        names = dict.fromkeys(name.rpartition(".")[2] for name in _linears(model))
        fault = str(error) if targets else f"there is no default for '{architecture}': name some."
        raise LoraError(
            f"lora.targets = {targets}: {fault} This model's linear layers: {', '.join(names)}"
        ) from error
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and config.rank > _smaller_side(module.get_base_layer()):
            most = _smaller_side(module.get_base_layer())
            raise LoraError(f"lora.rank = {config.rank}: {name} allows at most {most}")
    return adapted


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted, by name."""
    kinds = (nn.Linear, Conv1D)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _smaller_side(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):  # a quantized one keeps its weight in another shape
        return min(layer.in_features, layer.out_features)
    return int(min(layer.weight.shape))  # type: ignore[arg-type]
