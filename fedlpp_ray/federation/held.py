"""The frozen models that colluding clients have, each with an adapter to put states into."""

from __future__ import annotations

import torch
from torch import nn

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import FULL_PRECISION, Experiment
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.emulation import correction_of, load_client_base
from fedlpp_ray.lora import ModelState, add_adapter, add_residuals, store_in_bf16
from fedlpp_ray.privacy.view import Base
from fedlpp_ray.state import State


def bases_of(experiment: Experiment) -> tuple[Base, ...]:
    """The frozen models of the colluders; W0 is not named twice where clients have it anyhow."""
    has_all = experiment.client.base_bits == FULL_PRECISION and experiment.client.compute == "fp32"
    adversary = experiment.adversary
    public = adversary.base != "proprietary" and experiment.emulator.kind == "none"
    if has_all or not public or adversary.architecture == "unknown":
        return ("client",)
    # The server's correction is made of W0 and of the quantizer, which who has W0 knows.
    corrected = experiment.server.base_correction > 0
    return ("client", "public", "corrected") if corrected else ("client", "public")


def _corrected_base(experiment: Experiment, text: FederatedText) -> nn.Module:
    """W0 + R, as the server measures its model on."""
    base = load_base(experiment, text)
    correction = correction_of(experiment, base)
    assert correction is not None
    correction.fold()
    return base


class Held:
    """A frozen model with an adapter to put states into.

    Args:
        experiment: Says which adapter.
        base: The frozen model; it is changed.
        device: Where it goes.
        compute: As of `client.compute`.
    """

    def __init__(
        self, experiment: Experiment, base: nn.Module, device: torch.device, compute: str = "fp32"
    ) -> None:
        adapter, lora = experiment.adapter, experiment.lora
        self.model = add_adapter(base, adapter, lora, experiment.seed).to(device)
        method = find_method(experiment.server.aggregation)
        if method.writes_base and experiment.server.send_residual:
            add_residuals(self.model)
        self.state = ModelState(self.model)
        self.initial = self.state.read()
        if compute == "bf16":
            store_in_bf16(self.model)

    def put(self, state: State) -> nn.Module:
        """The model with a state in it."""
        self.state.write(state)
        return self.model


def held_of(
    experiment: Experiment, text: FederatedText, device: torch.device, emulator: bytes | None
) -> dict[Base, Held]:
    """Those of an experiment's adversary.

    Args:
        experiment: What was run.
        text: Its text, of which the task is read.
        device: Where they go.
        emulator: What clients have in the place of W0, if they do.

    Raises:
        AssetError, TaskError: the model cannot be used.
    """
    bases = bases_of(experiment)
    client, compute = load_client_base(experiment, text, emulator), experiment.client.compute
    found: dict[Base, Held] = {"client": Held(experiment, client, device, compute)}
    if "public" in bases:
        found["public"] = Held(experiment, load_base(experiment, text), device)
    if "corrected" in bases:
        found["corrected"] = Held(experiment, _corrected_base(experiment, text), device)
    return found
