"""Noise of each client's own in its message, which cancels over those who were sampled.

    D_i = deq(quant(S + E_i)),  E_i = c s rms(S) (Z_i - sum_j w_j Z_j),  Z_i ~ N(0, 1)

tensor by tensor, with w_i the server's weights, of sum 1, over the k clients sampled for a round.
So sum_i w_i E_i = 0, whatever the weights. An entry of Z_i - sum_j w_j Z_j has the variance
1 - 2 w_i + sum_j w_j^2, over the clients 1 - 2/k + sum_j w_j^2 on average; c^2 is one over that, so
that the mean of E_i^2 over the clients is (s rms(S))^2, and with equal weights each one's is.

The server adds eta sum_i w_i (a_i - D_i), differences to what was sent. So E_i itself never comes
into S, whoever drops out. It moves the point at which a client's update u_i starts:

    u_i(S + E_i) = u_i(S) + J_i E_i + O(s^2)
    sum_i w_i J_i E_i = sum_i w_i (J_i - J) E_i  for any J

What is left to first order is by how much clients differ. If some drop out, J times the weighted
sum of the others' E_i is left as well; it is not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fedlpp_ray.seeds import generator
from fedlpp_ray.state import State


class Perturbation:
    """The noise of one broadcast. Draws follow from the seed, the round and the client.

    Args:
        size: s; at 0 there is none.
        seed: Of the experiment.
        round: In which the broadcast is made.
        state: S.
        weights: By client that was sampled its weight, of any sum above 0.
    """

    def __init__(
        self, size: float, seed: int, round: int, state: State, weights: Mapping[int, float]
    ) -> None:
        self._size, self._seed, self._round, self._state = size, seed, round, state
        total = math.fsum(weights.values())
        self._weights = {client: w / total for client, w in sorted(weights.items())}

    def of(self, client: int) -> State:
        """S + E_i, fp32.

        Of a client that was not sampled, whose message is only measured, E_i = s rms(S) Z_i: noise
        of the same size that is no part of the sum.
        """
        if not self._size:
            return self._state
        return {name: self._noisy(name, tensor, client) for name, tensor in self._state.items()}

    def _noisy(self, name: str, tensor: Tensor, client: int) -> Tensor:
        noise = self._draw(name, client)
        if client in self._weights:
            noise = self._c * (noise - self._mean[name])
        values = tensor.double()
        return (values + self._size * values.square().mean().sqrt() * noise).float()

    @cached_property
    def _c(self) -> float:
        squares = math.fsum(w**2 for w in self._weights.values())
        return 1 / math.sqrt(1 - 2 / len(self._weights) + squares)

    @cached_property
    def _mean(self) -> State:
        """sum_j w_j Z_j, float64."""
        found = {}
        for name, tensor in self._state.items():
            found[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            for client, weight in self._weights.items():
                found[name] += weight * self._draw(name, client)
        return found

    def _draw(self, name: str, client: int) -> Tensor:
        """Z_i, float64."""
        random = generator(self._seed, "perturbation", self._round, client, name)
        return torch.randn(self._state[name].shape, generator=random, dtype=torch.float64)
