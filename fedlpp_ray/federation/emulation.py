"""The bases of a federation's parties: the server's model, and what clients have of it."""

from __future__ import annotations

import copy
import functools
import logging

import torch
from torch import nn

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import FederatedText, base_of, load_base
from fedlpp_ray.models import (
    emulator_bytes,
    load_emulator,
    make_emulator,
    modules_named,
    quantize_base,
    share_base,
    trained_modules,
)
from fedlpp_ray.seeds import derive
from fedlpp_ray.training import distill

logger = logging.getLogger(__name__)


def emulate(
    experiment: Experiment, text: FederatedText, base: nn.Module, device: torch.device
) -> bytes | None:
    """The emulator as its clients download it; None where they have the model itself.

    It has no tensor that a broadcast brings: neither the head nor what else is trained whole.

    Args:
        experiment: `emulator` and `adapter` say which.
        text: Has the server's own examples.
        base: W0, without adapters; it is not changed.
        device: Where it is distilled.

    Raises:
        LayersError: as `make_emulator`.
    """
    config, adapter = experiment.emulator, experiment.adapter
    if config.kind == "none":
        return None
    emulator = make_emulator(copy.deepcopy(base), config, adapter.outer)
    if config.steps:
        losses = distill(
            base,
            emulator,
            config,
            adapter.outer,
            text.servers(),
            seed=derive(experiment.seed, "distill"),
            pad=text.pad,
            device=device,
        )
        logger.info("emulator: relative error %.3g, distilled to %.3g", losses[0], losses[-1])
    return emulator_bytes(emulator, _broadcast_modules(experiment, base))


def load_client_base(
    experiment: Experiment, text: FederatedText, emulator: bytes | None = None
) -> nn.Module:
    """A client's frozen base: W0 or its emulator, quantized as `client` says; not what is trained.

    Args:
        experiment: What to run.
        text: Says for which kind of task.
        emulator: What `emulate` made.

    Raises:
        AssetError, BaseFormatError, LayersError: the model cannot be used.
        ValueError: the emulator is missing, or another experiment's.
    """
    config = experiment.emulator
    if config.kind == "none":
        whole_of = functools.partial(_broadcast_modules, experiment)
        return share_base(base_of(experiment, text), experiment.client, whole_of)
    if emulator is None:
        raise ValueError(f"emulator.kind '{config.kind}': the server's emulator is missing")
    base = load_base(experiment, text)
    whole = _broadcast_modules(experiment, base)
    load_emulator(make_emulator(base, config, experiment.adapter.outer), emulator, whole)
    # Quantized before it moves: the device never holds the full base, and bitsandbytes quantizes
    # int8 on the way there only.
    return quantize_base(base, experiment.client, whole)


def _broadcast_modules(experiment: Experiment, base: nn.Module) -> list[str]:
    """Names of the modules that are trained whole, so that every broadcast brings them."""
    named = modules_named(base, experiment.lora.modules_to_save)
    return [*named, *trained_modules(base, experiment.adapter)]
