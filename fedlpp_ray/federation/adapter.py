"""A model's trained state as the files of an adapter, and back."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

import safetensors.torch
from torch import nn

from fedlpp_ray.lora import save_adapter
from fedlpp_ray.state import State, part, schema_of

ADAPTER_STATE = "adapter_model.safetensors"


class AdapterFiles:
    """The files of a model's adapter, as `save_adapter` writes them.

    Those without tensors do not depend on what is trained and are made once: PEFT takes longer for
    its model card than for a small adapter.

    Args:
        model: With its adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def of(self, state: State) -> dict[str, bytes]:
        """The files, by name, of the model with this state; residuals are not in them."""
        tensors = {name: t.contiguous() for name, t in state.items() if part(name) != "residual"}
        return self._others | {ADAPTER_STATE: safetensors.torch.save(tensors, {"format": "pt"})}

    @cached_property
    def _others(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self._model, Path(folder))
            found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return {name: content for name, content in found.items() if name != ADAPTER_STATE}


def adapter_state(files: dict[str, bytes], expected: State) -> State:
    """The tensors of an adapter's files.

    Args:
        files: As `AdapterFiles` returns them.
        expected: A state with the same names and shapes.

    Raises:
        ValueError: it is an adapter of another model, kind, size or method.
    """
    state = safetensors.torch.load(files[ADAPTER_STATE])
    if schema_of(state) != schema_of(expected):
        raise ValueError("the adapter's tensors are not those of this experiment")
    return state
