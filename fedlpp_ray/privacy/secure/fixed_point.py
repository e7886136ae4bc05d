"""States as vectors of integers mod 2^bits whose sum is that of the integers, never wrapped."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from fedlpp_ray.errors import UserError
from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure.primitives import Vector
from fedlpp_ray.privacy.secure.session import Bits
from fedlpp_ray.state import Schema, State

_EXACT = 53
"""Integers below 2^53 are float64 numbers."""
_LARGEST_WEIGHT = 2**29
"""Up to it the product with an fp32 number is a float64 number."""


@dataclass(frozen=True)
class Grid:
    """How values become integers: `round(weight * value / unit)`, then the weight itself.

    The unit is the smallest power of two with which no sum of `clients` such integers reaches
    2^(bits - 1), so that it cannot wrap, or 2^53, so that float64 holds it. Rounding, to nearest,
    is all that is lost: a weighted sum is off by half a unit per client at most, a weighted mean by
    half a unit. Where weight * value is a multiple of the unit nothing is lost.

    Attributes:
        clip: Largest absolute value that a client may have, 1e-30 to 1e38. Beyond it is an error:
            nothing is clipped.
        max_weight: Largest weight, for instance the largest number of examples; at most 2^29.
        clients: How many there are at most.
        bits: Of the integers. With 32 a message is as large as one in fp32, but of 31 bits those of
            `clients * max_weight` are not left for the values.

    Raises:
        UserError: naming the attribute, and what is allowed.
    """

    clip: float
    max_weight: int
    clients: int
    bits: Bits = 64

    def __post_init__(self) -> None:
        if not 1e-30 <= self.clip <= 1e38:
            raise UserError(f"clip is {self.clip}; from 1e-30 to 1e38")
        if not 1 <= self.max_weight <= _LARGEST_WEIGHT:
            raise UserError(f"max_weight is {self.max_weight}; from 1 to 2^29")
        if self.clients < 1 or self.clients * (self.max_weight + 1) > self._limit:
            raise UserError(
                f"{self.clients} clients of weight {self.max_weight} do not fit into {self.bits} "
                "bits; at least 1 and fewer clients, a smaller max_weight, or 64 bits"
            )

    @property
    def unit(self) -> float:
        """Distance of two values of the grid at weight 1; a power of two."""
        return 2.0**-self._exponent

    def encode(self, state: State, weight: int = 1) -> Vector:
        """A client's vector: (all values of the state by name, then the weight), unsigned.

        Args:
            state: fp32 tensors; not changed.
            weight: Of the client.

        Raises:
            MessageError: the weight, or a value of a named tensor, is not finite or out of range.
        """
        if not 1 <= weight <= self.max_weight:
            raise MessageError(f"its weight is {weight}; from 1 to {self.max_weight} is allowed")
        parts = [self._integers(name, tensor, weight) for name, tensor in sorted(state.items())]
        signed = np.concatenate([*parts, np.array([weight], np.int64)])
        return signed.astype(f"<i{self.bits // 8}").view(f"<u{self.bits // 8}")

    def decode(self, total: Vector, schema: Schema) -> tuple[State, int]:
        """Weighted sum and sum of weights from a sum of vectors.

        Args:
            total: (length,), of at most `clients` vectors mod 2^bits.
            schema: Names and shapes of the clients' states.

        Returns:
            float64 tensors, exactly the sum of what the clients encoded; and the total weight.

        Raises:
            ValueError: the vector is not as long as the schema's states.
        """
        sizes = {name: int(np.prod(shape, dtype=int)) for name, shape in sorted(schema.items())}
        if total.shape != (length_of(schema),):
            raise ValueError(f"a vector of shape {total.shape} for {length_of(schema)} numbers")
        signed = total.view(f"<i{self.bits // 8}").astype(np.int64)
        values = torch.from_numpy(signed[:-1] * self.unit)
        parts = torch.split(values, list(sizes.values()))
        state = {n: part.reshape(schema[n]) for n, part in zip(sizes, parts, strict=True)}
        return state, int(signed[-1])

    def mean(self, total: Vector, schema: Schema, count: int) -> State:
        """The weighted mean, float64, of what `decode` takes.

        Args:
            total: As of `decode`.
            schema: As of `decode`.
            count: Of how many vectors it is the sum.

        Raises:
            MessageError: so many weights cannot come to the total's.
        """
        state, weight = self.decode(total, schema)
        if not count <= weight <= count * self.max_weight:
            raise MessageError(
                f"the weights of {count} clients come to {weight}; from {count} to "
                f"{count * self.max_weight} is allowed"
            )
        return {name: tensor / weight for name, tensor in state.items()}

    def _integers(self, name: str, tensor: torch.Tensor, weight: int) -> np.ndarray:
        values = tensor.detach().reshape(-1).to(torch.float64).numpy()
        if not (np.abs(values) <= self.clip).all():
            largest = np.abs(values).max()
            raise MessageError(f"{name}: holds {largest:.4g}; at most {self.clip:.4g} is allowed")
        return np.rint(values * weight * 2.0**self._exponent).astype(np.int64)

    @property
    def _limit(self) -> int:
        return int(2 ** min(self.bits - 1, _EXACT)) - 1

    @property
    def _exponent(self) -> int:
        """The largest e with clients * (max_weight * clip * 2^e + 1/2) <= limit."""
        largest = (Fraction(self._limit, self.clients) - Fraction(1, 2)) / self.max_weight
        ratio = largest / Fraction(self.clip)
        exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
        return exponent if Fraction(2) ** exponent <= ratio else exponent - 1


def length_of(schema: Schema) -> int:
    """Of the vectors of such states: all values, and the weight."""
    return sum(int(np.prod(shape, dtype=int)) for shape in schema.values()) + 1
