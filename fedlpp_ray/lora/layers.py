"""The first and last layers of a model as its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fedlpp_ray.models import outer_layers


class OuterLayers(nn.Module):
    """A model whose outer layers are trained as they are (offsite-tuning, arXiv 2302.04870, whose
    adapter they are: "sandwich").

    Args:
        model: A frozen model.
        outer: So many first and as many last layers.

    Raises:
        LayersError: it has too few layers.
    """

    def __init__(self, model: nn.Module, outer: int) -> None:
        super().__init__()
        found = outer_layers(model, outer)
        # Before the model, which has them too: a parameter is known by its first name.
        self.layers = nn.ModuleDict({path.rpartition(".")[2]: x for path, x in found.items()})
        self.layers.requires_grad_(True)
        self.base_model = model

    def forward(self, **inputs: Tensor) -> Any:
        """As the model."""
        return self.base_model(**inputs)

    def generate(self, **options: Any) -> Tensor:
        """As the model."""
        return self.base_model.generate(**options)  # type: ignore[no-any-return, operator]

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """PEFT has no format for this: the tensors alone, under the names of the state.

        layers.N.* belongs to the N-th layer of the model, base_model.* to the model.
        """
        safetensors.torch.save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
