"""A frozen model spread over the ranks of one party by DeepSpeed's ZeRO, stage 3.

Each rank holds a share of every large tensor; while a layer computes, forward or backward, its
tensors are whole. What is trained is none of this: adapters are added afterwards, and each rank has
them whole.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedlpp_ray.assets import AssetError
from fedlpp_ray.cache import Pages, return_large_blocks
from fedlpp_ray.config import ConfigError, ZeroConfig
from fedlpp_ray.models.head import within


def check_zero(zero: ZeroConfig, key: str) -> None:
    """Refuse what DeepSpeed would refuse when it starts.

    Args:
        zero: The section.
        key: Its name, for the message.

    Raises:
        ConfigError: DeepSpeed is not installed, or does not know a key or a value.
    """
    if not zero.stage:
        if extra := sorted(zero.model_extra or {}):
            raise ConfigError(f"{key}.{extra[0]} needs {key}.stage 2 or 3")
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{key}.stage {zero.stage} needs: pip install 'fedlpp_ray[zero]'")
    load_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero.model_dump())
    except (ValidationError, ValueError, AssertionError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
        words = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in faults]
        raise ConfigError(f"{key}: DeepSpeed says: {'; '.join(words) or error}") from None


def shard(
    model: nn.Module, zero: ZeroConfig, device: torch.device, kept: Iterable[str] = ()
) -> nn.Module:
    """Spread a model's parameters over the processes of torch.distributed's default group.

    All of them call this with the same model. It takes the values of rank 0, one tensor at a time,
    so that no rank holds more than its share and one tensor, if the model is mapped from files. The
    packed tensors of a quantized base are spread too.

    Args:
        model: Frozen, without adapters, on the CPU; changed in place.
        zero: Its stage is 3.
        device: Where it computes.
        kept: Names of modules that stay whole on every rank: those that will be trained.

    Raises:
        AssetError: NVMe is asked for, and this machine lacks what DeepSpeed needs for it.
    """
    deepspeed = load_deepspeed(device.type)
    _check_nvme(zero)
    if device.type == "cpu":
        return_large_blocks()
    from deepspeed.runtime.zero import parameter_offload

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero.model_dump()}
    kept = list(kept)
    for name in kept:
        model.get_submodule(name).float()
    with _without(model, kept):
        for layer in model.modules():
            _as_parameters(layer)
        _partition(model, config)
        # The engine itself is not needed: what it leaves are the hooks that gather and let go.
        engine = deepspeed.initialize(model=model, config=config)[0]
        # DeepSpeed would keep every model of the process alive in here.
        parameter_offload.FWD_MODULE_STACK.remove(model)
        engine.module = nn.Module()
    return model.to(device)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module has tensors of its own that are spread over ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside the block, which all ranks enter, a module's own tensors are whole; not to be changed.

    Nothing where they are not spread.
    """
    if not is_sharded(module):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))):
        yield


def load_deepspeed(kind: str) -> Any:
    """The package DeepSpeed, for this kind of device: quiet, and without what it would compile."""
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for another, and warns
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor` is deprecated", FutureWarning)
    # A C++ extension for ranks that share memory, compiled for 80 s when first used; gloo will do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check_nvme(zero: ZeroConfig) -> None:
    """DeepSpeed compiles its reader, on the machine that has the NVMe and when it is first used."""
    offload = (zero.model_extra or {}).get("offload_param") or {}
    if offload.get("device") != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise AssetError(
            "zero.offload_param.device 'nvme': DeepSpeed needs a C++ compiler and libaio with its "
            f"headers (Debian: g++, libaio-dev) on {platform.node()}, and does not find them"
        )


def _partition(model: nn.Module, config: dict[str, Any]) -> None:
    """Make every parameter this rank's share of it."""
    from deepspeed.runtime.zero import Init

    first: Any = None
    pages = Pages()
    for parameter in list(model.parameters()):
        whole = parameter.data
        # A copy: DeepSpeed writes what rank 0 has over the others' tensors.
        parameter.data = _in_fp32(whole)
        if first is None:
            first, holder = parameter, nn.ParameterList([parameter])
            Init(module=holder, config_dict_or_path=config, dtype=torch.float32)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
        pages.forget(whole)


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _as_parameters(layer: nn.Module) -> None:
    """Only parameters are spread: make a packed layer's tensors such."""
    for name in [name for name in layer._buffers if name.startswith("packed_")]:
        tensor = layer._buffers.pop(name)
        assert tensor is not None
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def _without(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside the block the model lacks these modules."""
    names, places = list(names), []
    for path, parent in list(model.named_modules()):
        for leaf, child in list(parent._modules.items()):
            if child is not None and within(f"{path}.{leaf}" if path else leaf, names):
                places.append((parent, leaf, child))
                parent._modules[leaf] = nn.Identity()
    try:
        yield
    finally:
        for parent, leaf, child in places:
            parent._modules[leaf] = child
