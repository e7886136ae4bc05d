"""One copy of a base on a node, whoever has it: its tensors are mapped from a file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fedlpp_ray.cache import Tensors, is_there, mapped_ranges, share
from fedlpp_ray.config import FULL_PRECISION, ClientConfig, ModelConfig
from fedlpp_ray.models.base import quantize_base
from fedlpp_ray.models.head import within
from fedlpp_ray.models.loading import load_generator, model_identity, read_classifier
from fedlpp_ray.models.outline import load_skeleton

KIND, VERSION = "bases", 1
"""Folder in the cache, and the version of what is written there. Raise it with every change."""
_BASE_KEYS = ("base_bits", "base_kind", "base_block", "base_scale", "dequantize_at_load")

Named = Callable[[nn.Module], list[str]]


@dataclass(frozen=True)
class Base:
    """Which base.

    Attributes:
        model: The pretrained model W0.
        classes: Number of classes; None: a causal language model.
        pad: The tokenizer's padding token.
        seed: Parameters that the checkpoint lacks are drawn from it.
    """

    model: ModelConfig
    classes: int | None
    pad: int
    seed: int

    def identity(self) -> object | None:
        """What tells W0's files from all others; None: nothing does."""
        return model_identity(self.model)

    def load(self, *, as_stored: bool = False) -> tuple[nn.Module, list[str]]:
        """W0 from its checkpoint, and the names of the parameters that it lacks.

        Args:
            as_stored: In the checkpoint's dtype, so that its files can be mapped as they are.

        Raises:
            AssetError: as `load_classifier` and `load_generator`.
        """
        if self.classes is None:
            return load_generator(self.model, self.pad, as_stored=as_stored), []
        return read_classifier(self.model, self.classes, self.pad, self.seed, as_stored=as_stored)


def share_base(base: Base, config: ClientConfig, whole: Named = lambda model: []) -> nn.Module:
    """W0, quantized as `config` says, whose frozen tensors all processes of a node share.

    A checkpoint that transformers maps as it is, in full precision, is mapped itself. All else is
    made once and mapped from `cache_folder()`. bitsandbytes' formats are each process's own: their
    tensors know how they were made and cannot be mapped. So is what will be trained.

    Args:
        base: Which.
        config: `base_bits` and the keys beside it.
        whole: Names of a model's modules that are trained whole, hence not quantized.

    Raises:
        AssetError, BaseFormatError: it cannot be loaded, or not in this format.
    """
    identity = base.identity()
    full = config.base_bits == FULL_PRECISION
    if identity is None or (config.base_format == "bitsandbytes" and not full):
        return _quantized(base.load()[0], config, whole)
    skeleton = load_skeleton(base.model, base.classes, base.pad)
    kept = whole(skeleton)
    key = key_of(base, config, identity, kept)
    if full and not is_there(KIND, key):
        model, drawn = base.load()
        if _is_mapped(model, drawn):
            return model
    make = functools.cache(lambda: _parts(base, config, whole))
    tensors = share(KIND, key, lambda: make()[0])
    if base.classes is not None:  # beside the rest, which is the same whatever the seed
        tensors |= share(KIND, key | {"seed": base.seed}, lambda: make()[1])
    quantize_base(skeleton, config, kept)
    if places(skeleton).keys() != tensors.keys():  # for instance a head that its checkpoint unties
        return _quantized(base.load()[0], config, whole)
    fill(skeleton, tensors, kept)
    return skeleton


def key_of(
    base: Base, config: ClientConfig, identity: object | None, kept: Iterable[str]
) -> dict[str, object]:
    """All that decides what is not drawn; in full precision nothing but W0 does."""
    full = config.base_bits == FULL_PRECISION
    return {
        "version": VERSION,
        "model": identity,
        "classes": base.classes,
        "format": None if full else [getattr(config, key) for key in _BASE_KEYS],
        "whole": [] if full else sorted(kept),
        "packages": [torch.__version__, transformers.__version__],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _quantized(model: nn.Module, config: ClientConfig, whole: Named) -> nn.Module:
    return quantize_base(model, config, whole(model))


def _parts(base: Base, config: ClientConfig, whole: Named) -> tuple[Tensors, Tensors]:
    """All tensors of a base by their first names: those of its checkpoint, and those drawn."""
    model, drawn = base.load()
    modules = {*drawn, *(name.rpartition(".")[0] or name for name in drawn)}
    found = {
        name: tensor.detach().contiguous()
        for name, (tensor, *_) in places(_quantized(model, config, whole)).items()
    }
    ours = {name: tensor for name, tensor in found.items() if within(name, modules)}
    return {name: tensor for name, tensor in found.items() if name not in ours}, ours


Place = tuple[nn.Module, str]


def places(model: nn.Module) -> dict[str, tuple[Tensor, list[Place]]]:
    """Every tensor once, by its first name, and where the model has it (tied: several places)."""
    found: dict[int, tuple[str, Tensor, list[Place]]] = {}
    for path, module in model.named_modules():
        for leaf, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                name = f"{path}.{leaf}" if path else leaf
                found.setdefault(id(tensor), (name, tensor, []))[2].append((module, leaf))
    return {name: (tensor, places) for name, tensor, places in found.values()}


def fill(skeleton: nn.Module, tensors: Tensors, kept: Iterable[str]) -> None:
    """Put tensors in the places of those without data; those that will be trained as copies."""
    found, kept = places(skeleton), list(kept)
    for name, (old, where) in found.items():
        new: Any = tensors[name].clone() if within(name, kept) else tensors[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        for module, leaf in where:
            setattr(module, leaf, new)


def _is_mapped(model: nn.Module, drawn: Iterable[str]) -> bool:
    """Whether files back all parameters but those drawn."""
    ranges = mapped_ranges()
    addresses = [p.data_ptr() for n, p in model.named_parameters() if n not in set(drawn)]
    return all(any(first <= a < last for first, last in ranges) for a in addresses)
