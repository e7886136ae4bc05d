"""Gaussian noise whose bits follow from a seed.

The generators are the project's, so that a run can be repeated. Who knows the seed can take the
noise off again: a deployment must draw it from a secret source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fedlpp_ray.state import State

Draw = Callable[[str], torch.Generator]
"""A tensor's name to the generator of its noise."""


def with_noise(update: State, stds: Mapping[str, float], draw: Draw) -> State:
    """An update plus N(0, std^2) on every element, fp32; where std is 0, the same bits.

    Args:
        update: fp32.
        stds: By name.
        draw: A fresh generator for a name.
    """
    return {
        name: (tensor.double() + noise(tensor, stds[name], draw(name))).float()
        if stds[name]
        else tensor
        for name, tensor in update.items()
    }


def noise(like: Tensor, std: float, random: torch.Generator) -> Tensor:
    """N(0, std^2), float64, of a tensor's shape."""
    return std * torch.randn(like.shape, generator=random, dtype=torch.float64)


class NoisedMean(Mapping[str, Tensor]):
    """A mean over a planned number of clients, with noise: computed when it is asked for.

    sum of the updates / n + N(0, std^2). n is planned, not how many returned: a missing client
    counts as one that has not moved, and what one client can change is fixed.

    Args:
        mean: Over those that returned, float64.
        share: How many returned of n: k / n.
        stds: By name, of the noise on the mean: that on the sum, over n. Other names are left out.
        draw: A fresh generator for a name.
    """

    def __init__(
        self, mean: Mapping[str, Tensor], share: float, stds: Mapping[str, float], draw: Draw
    ) -> None:
        self._mean, self._share, self._stds, self._draw = mean, share, stds, draw

    def __getitem__(self, name: str) -> Tensor:
        value, std = self._mean[name] * self._share, self._stds[name]
        return value + noise(value, std, self._draw(name)) if std else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stds)

    def __len__(self) -> int:
        return len(self._stds)
