"""What is decided of a round before the first return arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlpp_ray.aggregation.methods.base import Method, keep
from fedlpp_ray.aggregation.products import rank_of
from fedlpp_ray.state import Schema, State, layers_of, name_of


@dataclass(frozen=True)
class Plan:
    """What is known of a round before the first return.

    Attributes:
        method: How factors are aggregated.
        schema: Names and shapes of an update at the server's rank.
        broadcast: D at the server's own rank. A method that only averages updates does without.
        rule: The server's rule, by name.
        lr: The server's learning rate, for products.
        clients: Number of clients in the cohort: the most that will return.
    """

    method: Method
    schema: Schema
    broadcast: State
    rule: str
    lr: float
    clients: int

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """By what the rule multiplies P(S), mean P(D_i) and mean P(K_i) (`RoundSum.target`)."""
        return _COEFFICIENTS[self.rule](self.lr)

    def summed(self) -> Schema:
        """Shapes of the layers whose products are added as matrices, where the method has products.

        Of the others the factors are kept: side by side, those of the cohort have less than half
        of the matrix's rank.
        """
        ours, received, returned = self.coefficients
        shapes = self._layers()
        if not shapes:
            return {}
        rank = rank_of(self.broadcast)
        stacked = rank * (bool(ours) + self.clients * (bool(received) + bool(returned)))
        return {layer: shape for layer, shape in shapes.items() if 2 * stacked >= min(shape)}

    def kept(self) -> list[str]:
        """Names of the tensors that are kept of each update."""
        if self.method.direction is not None:
            return list(self.schema)
        stacked = [layer for layer in self._layers() if layer not in self.summed()]
        names = {name for layer in stacked for name in (name_of(layer, "A"), name_of(layer, "B"))}
        return [name for name in self.schema if name in names]

    def _layers(self) -> Schema:
        """Shapes of the layers' products, where the method has products."""
        if self.method.refit is keep:
            return {}
        found = self.broadcast
        return {
            layer: (len(found[name_of(layer, "B")]), found[name_of(layer, "A")].shape[1])
            for layer in layers_of(sorted(found))
        }


_COEFFICIENTS: dict[str, Callable[[float], tuple[float, float, float]]] = {
    "residual": lambda lr: (1.0, -lr, lr),
    "replace": lambda lr: (0.0, 1 - lr, lr),
    "pull": lambda lr: (1 - lr, 0.0, lr),
}
"""Learning rate to the coefficients of P(S), mean P(D_i) and mean P(K_i)."""
