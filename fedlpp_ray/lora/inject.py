"""Adapters on a frozen model."""

from __future__ import annotations

import warnings

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.config import LoraConfig
from fedlpp_ray.lora.whole import LoraError, check_whole
from fedlpp_ray.models import head_modules, is_sharded, within
from fedlpp_ray.seeds import global_seed

TARGETS: dict[str, list[str] | str] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "xlnet": ["rel_attn.q", "rel_attn.v"],
}
"""Modules that are adapted unless others are named, by architecture: PEFT's table, and its choice
for their kin where it has none."""


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Wrap a frozen model with LoRA.

    An adapted layer computes h = W0 x + (alpha/r) B A x with A (r, d_in), B (d_out, r), B = 0.
    Trained too, as a whole, are a classifier's head and the modules of `config.modules_to_save`. A
    causal model's language head is pretrained, and so it is frozen unless it is one of these.

    Args:
        model: A classifier or a causal language model: the base, in any format of
            `fedlpp_ray.models`.
        config: Rank, alpha, dropout, target modules, and modules to train whole.
        seed: A's initial values depend on it alone.

    Raises:
        LoraError: `config.targets` match no linear layer, or are None and there is no default for
            this architecture; the rank is above the smaller side of an adapted layer; or one of
            `config.modules_to_save` cannot be trained whole.
    """
    generates = bool(model.can_generate())  # type: ignore[operator]
    targets = _targets(model, config)
    lora = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM if generates else peft.TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    targeted = [n for n, _ in model.named_modules() if check_target_module_exists(lora, n)]
    head = [] if generates else head_modules(model)  # PEFT alone would train its last layer only
    named = check_whole(model, config.modules_to_save, targeted)
    lora.modules_to_save = whole = [*head, *(name for name in named if not within(name, head))]
    # Within what is trained whole, PEFT adapts nothing.
    _check_adapted(model, config, [name for name in targeted if not within(name, whole)])
    try:
        with global_seed(seed, "lora"), warnings.catch_warnings():
            # PEFT reads a property of transformers that the next release renames.
            warnings.filterwarnings("ignore", category=FutureWarning)
            # It sets this by the layer, and says so of every Conv1D, whose A and B are a Linear's.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        raise LoraError(f"lora.targets = {targets}: {error}") from error
    if any(map(is_sharded, model.modules())):
        # PEFT calls the model's `forward` alone, and not the hook that begins a pass.
        adapted.base_model.forward = model.__call__
    return adapted


def _targets(model: nn.Module, config: LoraConfig) -> list[str] | str:
    """Names of the modules to adapt; or, of some of PEFT's defaults, a regular expression."""
    if config.targets is not None:
        return list(config.targets)
    architecture = str(getattr(model.config, "model_type", ""))
    if architecture not in TARGETS:
        raise LoraError(
            f"lora.targets = None: there is no default for '{architecture}': name some. "
            f"{_known(model)}"
        )
    return TARGETS[architecture]


def _check_adapted(model: nn.Module, config: LoraConfig, adapted: list[str]) -> None:
    """Refuse layers that have no A and B, and a rank above the smaller side of one."""
    linears = _linears(model)
    other = [name for name in adapted if name not in linears]
    if other or not adapted:
        fault = f"'{other[0]}' is no linear layer" if other else "they match no module"
        raise LoraError(f"lora.targets = {_targets(model, config)}: {fault}. {_known(model)}")
    for name in adapted:
        most = _smaller_side(linears[name])
        if config.rank > most:
            raise LoraError(f"lora.rank = {config.rank}: {name} allows at most {most}")


def _known(model: nn.Module) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name in _linears(model))
    return f"This model's linear layers: {', '.join(names)}"


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be adapted, by name."""
    kinds = (nn.Linear, Conv1D)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _smaller_side(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):  # a quantized one keeps its weight in another shape
        return min(layer.in_features, layer.out_features)
    return int(min(layer.nx, layer.nf))  # type: ignore[type-var, arg-type]  # a Conv1D
