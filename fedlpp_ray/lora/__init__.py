"""LoRA through PEFT: injecting it, and reading and writing its state."""

from fedlpp_ray.lora.inject import add_lora
from fedlpp_ray.lora.state import State, is_head, read_state, state_digest, write_state

__all__ = ["State", "add_lora", "is_head", "read_state", "state_digest", "write_state"]
