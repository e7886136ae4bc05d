"""A client's base, made by the server layer by layer and received layer by layer.

So the server, whose model may be spread over ranks, never has it whole, neither dense nor
quantized; and a client needs no checkpoint, only the model's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

import safetensors.torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlpp_ray.assets import AssetError
from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.cache import Tensors, share_file, write_parts
from fedlpp_ray.config import FULL_PRECISION, ClientConfig
from fedlpp_ray.models.base import as_linear, linears, quantize_base, quantize_layer
from fedlpp_ray.models.head import within
from fedlpp_ray.models.outline import load_skeleton
from fedlpp_ray.models.sharded import gathered
from fedlpp_ray.models.shared import Base, fill, key_of, places

KIND = "streamed"
"""Folder in the cache."""


class BaseParts:
    """What a server gives away of its base.

    Args:
        base: Which base it is.
        model: It, frozen, perhaps spread over ranks, before adapters are added.
        config: `base_bits` and the keys beside it.
        whole: Names of modules that are trained whole, hence not quantized. Their tensors are
            copied here, before training changes them.
    """

    def __init__(
        self, base: Base, model: nn.Module, config: ClientConfig, whole: Iterable[str]
    ) -> None:
        whole = list(whole)
        full = config.base_bits == FULL_PRECISION
        self._config, self._quantized = config, () if full else tuple(linears(model, whole))
        known = base.identity() or uuid4().hex  # what nothing tells from others is shared by none
        kind = next(model.parameters()).device.type  # another may round another way
        made = {"seed": base.seed, "device": kind}
        self.identity = key_of(base, config, known, whole) | made
        self._layers: dict[str, tuple[nn.Module, list[str]]] = {}
        self._copies: Tensors = {}
        for name, (tensor, _) in places(model).items():
            path, _, leaf = name.rpartition(".")
            if within(name, whole):
                self._copies[name] = tensor.detach().clone()
            self._layers.setdefault(path, (model.get_submodule(path), []))[1].append(leaf)
        self._paths = list(self._layers)

    def __len__(self) -> int:
        return len(self._paths)

    def part(self, number: int, *, make: bool = True) -> bytes:
        """The tensors of one layer, quantized if it is a linear one; all ranks ask for it.

        Args:
            number: Below the number of parts.
            make: Whether this rank is to have it; empty on the others.
        """
        path = self._paths[number]
        layer, leaves = self._layers[path]
        with gathered(layer):
            if not make:
                return b""
            tensors = self._tensors(path, layer, leaves)
            return safetensors.torch.save({n: t.cpu().contiguous() for n, t in tensors.items()})

    def _tensors(self, path: str, layer: nn.Module, leaves: list[str]) -> Tensors:
        if path in self._quantized:
            linear = as_linear(layer) if isinstance(layer, Conv1D) else layer
            assert isinstance(linear, nn.Linear)
            layer = quantize_layer(linear, self._config)
            leaves = [name for name, _ in _own(layer)]
        prefix = f"{path}." if path else ""
        found = {f"{prefix}{leaf}": getattr(layer, leaf).detach() for leaf in leaves}
        return found | {name: copy for name, copy in self._copies.items() if name in found}


def _own(layer: nn.Module) -> list[tuple[str, Tensor]]:
    own = {**layer._parameters, **layer._buffers}
    return [(name, tensor) for name, tensor in own.items() if tensor is not None]


def receive_base(
    base: Base, config: ClientConfig, whole: Callable[[nn.Module], list[str]], stream: BaseStream
) -> nn.Module:
    """The base that a server streams; on a node one process receives it, and all map it.

    Args:
        base: Which; its checkpoint is not read.
        config: `base_bits` and the keys beside it.
        whole: Names of a model's modules that are trained whole.
        stream: From the server.

    Raises:
        AssetError: the server's model has other tensors than this configuration says.
    """
    skeleton = load_skeleton(base.model, base.classes, base.pad)
    kept = whole(skeleton)
    quantize_base(skeleton, config, kept)
    outline = {name: tensor for name, (tensor, _) in places(skeleton).items()}

    def write(path: Path) -> None:
        parts = map(stream.part, range(stream.count))
        write_parts(path, outline, map(safetensors.torch.load, parts))

    try:
        tensors = share_file(KIND, stream.identity, write)
        if differing := sorted(outline.keys() ^ tensors.keys()):  # another client received it
            raise ValueError(", ".join(differing[:5]))
    except ValueError as error:
        raise AssetError(
            f"model.name = '{base.model.name}': the server's model and this configuration differ "
            f"in {error}"
        ) from error
    fill(skeleton, tensors, kept)
    return skeleton
