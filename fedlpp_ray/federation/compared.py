"""The server's final model as its checkpoint has it, measured example by example."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import safetensors.torch
import torch

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.adapter import adapter_state
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.emulation import correction_of
from fedlpp_ray.federation.server import RESIDUAL
from fedlpp_ray.lora import ModelState, add_adapter, add_residuals
from fedlpp_ray.state import part
from fedlpp_ray.training import Scored


def score_server(
    experiment: Experiment, text: FederatedText, device: torch.device, files: Mapping[str, bytes]
) -> Scored:
    """What the server ends with, on its own base.

    Args:
        experiment: What was run.
        text: Its text.
        device: Where to compute.
        files: The adapter, as `checkpoint.trained` reads it.

    Raises:
        AssetError: the model cannot be used.
        ValueError: it is an adapter of another experiment.
    """
    base = load_base(experiment, text)
    correction = correction_of(experiment, base)
    model = add_adapter(base, experiment.adapter, experiment.lora, experiment.seed).to(device)
    if find_method(experiment.server.aggregation).writes_base:
        add_residuals(model)
    held = ModelState(model)
    initial = held.read()
    own = {name: x for name, x in initial.items() if part(name) != "residual"}
    residuals = safetensors.torch.load(files[RESIDUAL]) if RESIDUAL in files else {}
    held.write(initial | adapter_state(dict(files), own) | residuals)
    with correction.applied() if correction else nullcontext():
        return text.score(model, device)
