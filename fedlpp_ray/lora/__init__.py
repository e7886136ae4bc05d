"""What is trained of a model: LoRA through PEFT, a prompt, or layers; and its state."""

import logging

# Importing PEFT imports bitsandbytes, which says that it lacks a kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from fedlpp_ray.lora.adapt import add_adapter, save_adapter
from fedlpp_ray.lora.half import store_in_bf16
from fedlpp_ray.lora.inject import add_lora
from fedlpp_ray.lora.merge import adapted_numbers, merged
from fedlpp_ray.lora.state import (
    ModelState,
    add_residuals,
    at_rank,
    read_state,
    trainable,
    with_residuals,
    write_state,
)
from fedlpp_ray.lora.whole import LoraError

__all__ = [
    "LoraError",
    "ModelState",
    "adapted_numbers",
    "add_adapter",
    "add_lora",
    "add_residuals",
    "at_rank",
    "merged",
    "read_state",
    "save_adapter",
    "store_in_bf16",
    "trainable",
    "with_residuals",
    "write_state",
]
