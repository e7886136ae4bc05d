"""The bases of a federation's parties: the server's model, and what clients have of it."""

from __future__ import annotations

import copy
import functools
import logging

import torch
from torch import nn

from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import FederatedText, base_of, load_base
from fedlpp_ray.models import (
    Correction,
    emulator_bytes,
    head_modules,
    is_sharded,
    load_emulator,
    make_emulator,
    modules_named,
    quantize_base,
    receive_base,
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
    emulator = make_emulator(_copy_of(experiment, text, base), config, adapter.outer).float()
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
    return emulator_bytes(emulator, broadcast_modules(experiment, base))


def _copy_of(experiment: Experiment, text: FederatedText, base: nn.Module) -> nn.Module:
    """A model of its own with the values of the base."""
    if any(map(is_sharded, base.modules())):  # mapped from the checkpoint: only what stays is read
        return base_of(experiment, text).load(as_stored=True)[0]
    return copy.deepcopy(base)


def load_client_base(
    experiment: Experiment,
    text: FederatedText,
    emulator: bytes | None = None,
    stream: BaseStream | None = None,
) -> nn.Module:
    """A client's frozen base: W0 or its emulator, quantized as `client` says; not what is trained.

    Args:
        experiment: What to run.
        text: Says for which kind of task.
        emulator: What `emulate` made.
        stream: Where the server makes the base; None: it is made here, from the checkpoint.

    Raises:
        AssetError, BaseFormatError, LayersError: the model cannot be used.
        ValueError: the emulator is missing, or another experiment's.
    """
    config = experiment.emulator
    if config.kind == "none":
        base, whole_of = base_of(experiment, text), functools.partial(broadcast_modules, experiment)
        if stream:
            return receive_base(base, experiment.client, whole_of, stream)
        return share_base(base, experiment.client, whole_of)
    if emulator is None:
        raise ValueError(f"emulator.kind '{config.kind}': the server's emulator is missing")
    model = load_base(experiment, text)
    whole = broadcast_modules(experiment, model)
    load_emulator(make_emulator(model, config, experiment.adapter.outer), emulator, whole)
    # Quantized before it moves: the device never holds the full base, and bitsandbytes quantizes
    # int8 on the way there only.
    return quantize_base(model, experiment.client, whole)


def correction_of(experiment: Experiment, base: nn.Module) -> Correction | None:
    """What gives W0 back the base of the clients, as `server.base_correction` says; None at 0.

    Args:
        experiment: What to run.
        base: W0, without adapters; it is not changed.
    """
    rank = experiment.server.base_correction
    if not rank:
        return None
    return Correction(base, experiment.client, rank, broadcast_modules(experiment, base))


def trained_whole(experiment: Experiment, base: nn.Module, text: FederatedText) -> list[str]:
    """Names of all modules that are trained as they are, a classifier's head included."""
    head = [] if text.classes is None else head_modules(base)
    return [*head, *broadcast_modules(experiment, base)]


def broadcast_modules(experiment: Experiment, base: nn.Module) -> list[str]:
    """Names of the modules that are trained whole, so that every broadcast brings them."""
    named = modules_named(base, experiment.lora.modules_to_save)
    return [*named, *trained_modules(base, experiment.adapter)]
