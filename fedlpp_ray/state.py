"""The trainable state of a model as a value: what is kept, sent, and averaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

State = dict[str, Tensor]
"""Trainable tensors by name, fp32 on the CPU: per adapted layer A (r, d_in) and B (d_out, r), and
what is trained whole: a classifier's head and the modules of `lora.modules_to_save`. In the place
of A and B there may be a prompt (tokens, width), or the tensors of the outer layers. The names are
those of the adapter's file, in sorted order."""

Part = Literal["A", "B", "residual", "adapter", "head", "variate", "columns"]
_MARKS: dict[Literal["A", "B", "residual"], str] = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "residual": ".residual.weight",
}

PROMPT = "prompt_embeddings"
"""The name of a prompt, as in PEFT's files."""
LAYERS = "layers."
"""Prefix of the tensors of a trained layer; its number follows, then the name within the layer."""
VARIATE = "variate:"
"""Prefix of SCAFFOLD's control variate of a tensor."""
COLUMNS = "columns:"
"""Prefix of the flags of a tensor's columns: (columns,), 1 where a column travels and 0 else."""
FACTOR_AXIS: dict[Part, int] = {"A": 0, "B": 1}
"""The axis of a factor that has the rank."""

Schema = Mapping[str, tuple[int, ...]]
"""Names and shapes of a state's tensors, in sorted order."""


def schema_of(state: State) -> Schema:
    """Names and shapes of everything in a state."""
    return {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}


def schema_digest(schema: Schema) -> str:
    """SHA-256 over names and shapes."""
    return hashlib.sha256(json.dumps(sorted(schema.items())).encode()).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bits: two runs with equal digests hold exactly the same state.

    Tensors that are computed when they are asked for are there one at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def part(name: str) -> Part:
    """What a tensor is: a factor A or B, a residual, an adapter, a variate, flags, or "head".

    "adapter" is what is trained in the place of A and B: a prompt, or the outer layers. "head" is
    what is trained whole beside them, the modules of `lora.modules_to_save` included.
    """
    if name.startswith(VARIATE):
        return "variate"
    if name.startswith(COLUMNS):
        return "columns"
    if name == PROMPT or name.startswith(LAYERS):
        return "adapter"
    for kind, mark in _MARKS.items():
        if name.endswith(mark):
            return kind
    return "head"


def is_head(name: str) -> bool:
    """Whether a state's tensor is trained whole, as a classifier's head is, rather than adapted."""
    return part(name) == "head"


def layers_of(names: Iterable[str]) -> list[str]:
    """The adapted layers of a state, in the order of its names."""
    return [name.removesuffix(_MARKS["A"]) for name in names if part(name) == "A"]


def name_of(layer: str, kind: Literal["A", "B", "residual"]) -> str:
    """The name of a layer's factor or residual."""
    return f"{layer}{_MARKS[kind]}"
