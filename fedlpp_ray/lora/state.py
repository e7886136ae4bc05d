"""Reading and writing the state of a model: what it trains, and what is added to its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from fedlpp_ray.state import FACTOR_AXIS, Part, State, name_of, part

ADAPTER = "default"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names of PEFT's adapter files, sorted."""
    named = {
        name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(named.items()))


def add_residuals(model: nn.Module) -> list[RemovableHandle]:
    """Give every adapted layer a residual E, at first zero: h = W0 x + (alpha/r) (B A + E) x.

    E (d_out, d_in) is a frozen buffer beside the base, whatever the base's format.

    Returns:
        What takes E out of each layer's computation again.
    """
    handles = []
    for module in _lora_layers(model).values():
        b, a = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight
        residual = torch.zeros(b.shape[0], a.shape[1], device=a.device)
        module.register_buffer("residual", residual, persistent=False)
        handles.append(module.register_forward_hook(_add_residual))
    return handles


@contextmanager
def with_residuals(model: nn.Module) -> Iterator[None]:
    """Inside the block every adapted layer has a residual (`add_residuals`); after it, none."""
    handles = add_residuals(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in _lora_layers(model).values():
            del module.residual


def _add_residual(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = inputs[0]
    added: Tensor = module.scaling[ADAPTER] * linear(x, module.residual.to(x.dtype))
    return output + added


class ModelState:
    """The trainable tensors and residuals of a model, looked up once: that walks all its modules.

    Args:
        model: With adapters, all of them trainable. Its modules stay those that they are, or come
            back, as after `merged`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _lora_layers(model)
        self._trainable = trainable(model)
        residuals = {
            name_of(layer, "residual"): module.residual
            for layer, module in self._layers.items()
            if "residual" in module._buffers
        }
        self._tensors: State = dict(sorted((residuals | self._trainable).items()))

    def read(self, rank: int | None = None) -> State:
        """A copy of all tensors, on the CPU.

        Args:
            rank: Only the first so many rows of each A and columns of each B. None: all.
        """
        return {
            name: at_rank(name, tensor.detach(), rank)
            .to("cpu", torch.float32, copy=True)
            .contiguous()
            for name, tensor in self._tensors.items()
        }

    def write(self, state: State) -> None:
        """Copy `state` into the model.

        Factors of a smaller rank r fill the first rows and columns; the rest is zero and stays zero
        in training, and the product is scaled by alpha / r: it is a model of rank r.

        Raises:
            ValueError: the names differ from the model's.
        """
        if self._tensors.keys() != state.keys():
            different = sorted(self._tensors.keys() ^ state.keys())
            raise ValueError(f"state and model differ in: {', '.join(different)}")
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                axis = FACTOR_AXIS.get(part(name))
                rank = None if axis is None else state[name].shape[axis]
                own = at_rank(name, tensor, rank)
                if own.shape != tensor.shape:
                    tensor.zero_()
                own.copy_(state[name])
            for layer, module in self._layers.items():
                rank = state[name_of(layer, "A")].shape[0]
                module.scaling[ADAPTER] = module.lora_alpha[ADAPTER] / rank

    @contextmanager
    def training_only(self, parts: frozenset[Part]) -> Iterator[None]:
        """Inside the block, of what is trainable only these parts are."""
        frozen = [p for name, p in self._trainable.items() if part(name) not in parts]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def read_state(model: nn.Module) -> State:
    """A copy of a model's state (`ModelState.read`)."""
    return ModelState(model).read()


def write_state(model: nn.Module, state: State) -> None:
    """Copy a state into a model (`ModelState.write`).

    Raises:
        ValueError: the names differ from the model's.
    """
    ModelState(model).write(state)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def at_rank(name: str, tensor: Tensor, rank: int | None) -> Tensor:
    """The first `rank` rows of an A, columns of a B; any other tensor, and with None, whole."""
    axis = FACTOR_AXIS.get(part(name))
    return tensor if rank is None or axis is None else tensor.narrow(axis, 0, rank)
