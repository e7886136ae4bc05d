"""Gaussian noise whose bits follow from a seed, and from what it is added to.

Of two releases with the same noise the difference has none, and of two with multiples of it a
combination has none. So the draw depends on every bit of what is noised and on the standard
deviations (`draw_for`): the same release is the same bits again, and any other has noise of its
own.

The generators are the project's, so that a run can be repeated. Who knows the seed can check a
guess of what was noised; and torch's generator on a CPU heeds 32 bits of what it is seeded with,
which can be tried out without the seed. A deployment must draw noise by a cipher with a secret key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fedlpp_ray.seeds import generator
from fedlpp_ray.state import State, state_digest

Draw = Callable[[str], torch.Generator]
"""A tensor's name to the generator of its noise."""


def draw_for(
    values: Mapping[str, Tensor], stds: Mapping[str, float], seed: int, *purpose: str | int
) -> Draw:
    """The draw of the noise on some values: another one where a bit of them, or of `stds`, differs.

    Args:
        values: What is noised.
        stds: By name, of the noise.
        seed: Of the experiment.
        purpose: As of `seeds.derive`: what else tells releases apart that may have equal values.
    """
    sizes = hashlib.sha256(json.dumps(sorted(stds.items())).encode()).hexdigest()
    return partial(generator, seed, *purpose, sizes, state_digest(values))


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
