"""The trainable state of a model as a value: what is kept, sent, and averaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]
"""Trainable tensors by name, fp32 on the CPU: per adapted layer A (r, d_in) and B (d_out, r), and
the classification head. The names are those of PEFT's adapter files, in sorted order."""

Schema = Mapping[str, tuple[int, ...]]
"""Names and shapes of a state's tensors, in sorted order."""


def schema_of(state: State) -> Schema:
    """Names and shapes of everything in a state."""
    return {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}


def schema_digest(schema: Schema) -> str:
    """SHA-256 over names and shapes."""
    return hashlib.sha256(json.dumps(sorted(schema.items())).encode()).hexdigest()


def state_digest(state: State) -> str:
    """SHA-256 over names and bits: two runs with equal digests hold exactly the same state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_head(name: str) -> bool:
    """Whether a state's tensor belongs to the classification head rather than to an adapter."""
    return ".lora_" not in name
