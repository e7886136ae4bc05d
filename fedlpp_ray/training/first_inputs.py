"""What the first adapted layer of a model reads, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlpp_ray.lora import trainable
from fedlpp_ray.privacy import PrivacyError
from fedlpp_ray.state import layers_of


class _Enough(Exception):
    """The first input is known; the model need not go on."""


@dataclass(frozen=True)
class FirstInputs:
    """The inputs of a model's first adapted layers.

    Attributes:
        layers: Names of the layers, as in a state, that read one and the same input: of the first
            transformer layer all of q, k and v that are adapted.
        inputs: (tokens, positions, d_in) fp32 on the CPU: of each token at each position. Llama's
            are the same at all positions, since only its attention knows them: then one is given.
    """

    layers: tuple[str, ...]
    inputs: Tensor


def first_inputs(
    model: nn.Module,
    tokens: Tensor,
    positions: int,
    device: torch.device,
    token_type: int | None = None,
) -> FirstInputs:
    """The input of the first adapted layers for each token at each position.

    BERT's are the embeddings of token, position and type, normalised; Llama's the token's,
    normalised; GPT-2's the first layer norm of both. The model runs no further than that.

    Args:
        model: With LoRA; left in evaluation mode, in which there is no dropout.
        tokens: (tokens,) int64.
        positions: How many, from the first.
        device: Where the model is.
        token_type: Of all tokens, where the texts are pairs: 0 in the first text, 1 in the second.

    Raises:
        PrivacyError: the model has no LoRA; or its first adapted layer reads more than one token,
            for it stands behind attention, so that its inputs cannot be listed.
    """
    rows = tokens[:, None].repeat(1, positions)
    layers, inputs = _read(model, rows, device, token_type)
    mixed = rows.diagonal()[None] if len(rows) else rows  # token i at position i
    _, others = _read(model, mixed, device, token_type)
    alone = inputs[range(mixed.shape[1]), range(mixed.shape[1])]
    if not torch.allclose(others[0], alone, rtol=1e-4, atol=1e-5):
        raise PrivacyError(
            f"lora.targets: {layers[0]} reads more than one token, so that its inputs cannot be "
            "listed; the gradient-inversion probe needs an adapted layer before any attention"
        )
    fixed = bool((inputs == inputs[:, :1]).all())
    return FirstInputs(layers, inputs[:, :1] if fixed else inputs)


def _read(
    model: nn.Module, rows: Tensor, device: torch.device, token_type: int | None
) -> tuple[tuple[str, ...], Tensor]:
    """The first adapted layers, and their input for token ids (texts, positions)."""
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if found and inputs[0] is not found[0][1]:
                raise _Enough
            found.append((name, inputs[0]))

        return keep

    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if token_type is not None:
        batch["token_type_ids"] = torch.full_like(rows, token_type)
    modules = {name: model.get_submodule(name) for name in layers_of(trainable(model))}
    hooks = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            model.eval()(**{key: value.to(device) for key, value in batch.items()})
    except _Enough:
        pass
    finally:
        for each in hooks:
            each.remove()
    if not found:
        raise PrivacyError("adapter.kind: the gradient-inversion probe reads LoRA; allowed: 'lora'")
    return tuple(name for name, _ in found), found[0][1].float().cpu()
