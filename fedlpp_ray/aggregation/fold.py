"""From a cohort's returns to the server's next state: rule, optimiser and method together.

Returns are added as they arrive, in any order and in any grouping (`RoundSum.merge`), and give the
same bits. What is held does not grow with their number, but for a method with a `direction`, and
for a layer's factors as long as those of the whole cohort are smaller than the layer's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from fedlpp_ray.aggregation.exact import ExactMean, Parts
from fedlpp_ray.aggregation.methods.base import Return, Target
from fedlpp_ray.aggregation.optimizers import ServerOptimizer
from fedlpp_ray.aggregation.plan import Plan
from fedlpp_ray.aggregation.products import Matrix, Product, combine, product
from fedlpp_ray.aggregation.rules import next_state
from fedlpp_ray.state import State

SMALLEST = 2.0**-24
"""A weight below it counts as 0: the exact sums resolve 2^-62, so 38 bits of a term are left."""


class RoundSum:
    """What the returns of a round come to so far.

    Args:
        plan: Of the round.

    Attributes:
        plan: Of the round.
        clients: Whose returns it holds.
    """

    def __init__(self, plan: Plan) -> None:
        self.clients: frozenset[int] = frozenset()
        self.plan = plan
        self._names, self._summed = plan.kept(), plan.summed()
        self._kept: dict[int, Return] = {}
        self._means: dict[str, ExactMean] = {}

    def add(self, client: int, returned: Return) -> None:
        """Add one client's return.

        Raises:
            OverflowError: the weight or a value is not finite, or too large for an exact sum.
            ValueError: the client is in it already, or the names and shapes are not the plan's.

        Either way nothing has changed.
        """
        if client in self.clients:
            raise ValueError(f"client {client} has been added")
        terms = self._terms(returned)
        means = {kind: self._mean(kind) for kind in terms}
        for kind, (weight, term) in list(terms.items())[1:]:
            means[kind].check(term, weight)  # the first one's `add` does, before anything changes
        for kind, (weight, term) in terms.items():
            means[kind].add(term, weight)
        self._means |= means
        if self._names:
            update = {name: returned.update[name] for name in self._names}
            self._kept[client] = Return(returned.received, update, returned.weight)
        self.clients |= {client}

    def merge(self, other: RoundSum) -> None:
        """Add what another sum of the same plan holds; that one is unchanged.

        Raises:
            ValueError: both hold a client. Nothing has changed.
        """
        if both := sorted(self.clients & other.clients):
            raise ValueError(f"client {both[0]} has been added")
        for kind, mean in other._means.items():
            self._means[kind] = self._mean(kind)
            self._means[kind].merge(mean)
        self._kept |= other._kept
        self.clients |= other.clients

    def direction(self) -> Mapping[str, Tensor]:
        """K - D, float64, of at least one return; a mean is computed when it is asked for."""
        if self.plan.method.direction is not None:
            returns = [self._kept[client] for client in sorted(self._kept)]
            return self.plan.method.direction(returns, self.plan.broadcast)
        return _Lazily(self.plan.schema, self._means["mean" if "mean" in self._means else "idle"])

    def next_state(
        self,
        state: State,
        broadcast: State,
        optimizer: ServerOptimizer,
        random: torch.Generator,
    ) -> State:
        """The server's next state; the same one where nobody has returned.

        Args:
            state: S.
            broadcast: D, for the server's rule.
            optimizer: The server's optimiser, for factors.
            random: The round's random numbers, for methods that draw.
        """
        if not self.clients:
            return state
        after = next_state(self.plan.rule, state, broadcast, self.direction(), optimizer)
        return self.plan.method.refit(after, self.target(state), random)

    def target(self, state: State) -> Target:
        """The server's rule on products instead of factors, where a mean is exact.

        With P of a state for B A of one layer, and means over the cohort:

            residual  P(S) + lr (mean P(K_i) - mean P(D_i))
            replace   mean P(D_i) + lr (mean P(K_i) - mean P(D_i))
            pull      P(S) + lr (mean P(K_i) - P(S))

        Returns:
            A function from a layer's name to its next product.
        """
        ours = self.plan.coefficients[0]

        def target(layer: str) -> Product | Matrix:
            if layer in self._summed:
                moved = self._means["products"].value(layer)
                return Matrix(ours * product(state, layer).dense() + moved if ours else moved)
            return self._stack(state, layer, ours)

        return target

    def _stack(self, state: State, layer: str, ours: float) -> Product:
        """The same from the factors that were kept."""
        returns = [self._kept[client] for client in sorted(self._kept)]
        total = math.fsum(each.weight for each in returns)
        products, factors = ([product(state, layer)], [ours]) if ours else ([], [])
        for each in returns:
            for part, factor in self._products(each, layer):
                products.append(part)
                factors.append(factor * (each.weight / total))
        return combine(products, factors)

    def _products(self, each: Return, layer: str) -> list[tuple[Product, float]]:
        """P(D_i) and P(K_i) with their coefficients, those that are not 0."""
        _, received, returned = self.plan.coefficients
        both = ((each.received, received), (each.returned, returned))
        return [(product(held, layer), factor) for held, factor in both if factor]

    def _terms(self, returned: Return) -> dict[str, tuple[float, State]]:
        """What a return adds, by mean: weight and state."""
        method, terms = self.plan.method, {}
        if method.direction is None:
            weight, term = method.contribution(returned, self.plan.broadcast)
            if not (math.isfinite(weight) and weight >= 0):
                raise OverflowError(f"its weight is {weight}")
            kind, weight = ("mean", weight) if weight >= SMALLEST else ("idle", 1.0)
            terms[kind] = weight, term
        if self._summed:
            matrices = {}
            for layer in self._summed:
                parts, factors = zip(*self._products(returned, layer), strict=True)
                matrices[layer] = combine(parts, factors).dense()
            terms["products"] = returned.weight, matrices
        return terms

    def _mean(self, kind: str) -> ExactMean:
        """The mean of this kind, a new one where nothing has been added.

        "mean" is the direction. "idle" takes its place where no return has a weight above 0; it
        has those with weight 0, equally. "products" are the rule's products by layer.
        """
        schema = self._summed if kind == "products" else self.plan.schema
        return self._means.get(kind) or ExactMean(schema, self.plan.clients)

    @property
    def kinds(self) -> list[str]:
        """Which means it holds; for `parts`."""
        return sorted(self._means)

    def parts(self, kinds: Collection[str], clients: Collection[int]) -> Parts:
        """Dtypes and shapes of the `tensors` of a sum with such means and clients.

        Raises:
            ValueError: no sum of this plan has such means.
        """
        possible = {"mean", "idle", "products"}
        if not set(kinds) <= possible or ("products" in kinds) != bool(clients and self._summed):
            raise ValueError(f"means {', '.join(map(repr, kinds))} are not expected")
        found: Parts = {}
        for kind in kinds:
            schema = self._summed if kind == "products" else self.plan.schema
            found |= {f"{kind}/{n}": part for n, part in ExactMean.parts(schema).items()}
        for client in clients:
            shapes = {name: self.plan.schema[name] for name in self._names}
            found |= {f"{client}/{n}": (torch.float32, shape) for n, shape in shapes.items()}
        return found

    def tensors(self) -> State:
        """All that it holds, flat, for another process (`absorb`); not copies."""
        flat = {
            f"{kind}/{n}": t
            for kind, mean in self._means.items()
            for n, t in mean.tensors().items()
        }
        for client, each in self._kept.items():
            flat |= {f"{client}/{name}": tensor for name, tensor in each.update.items()}
        return flat

    def absorb(
        self, tensors: State, clients: Mapping[int, float], received: Callable[[int], State]
    ) -> None:
        """Merge what `tensors` gave elsewhere, whose dtypes and shapes are those of `parts`.

        Args:
            tensors: Of the other sum.
            clients: Whose returns it holds, with the weights of these.
            received: Client to D_i.

        Raises:
            ValueError: it cannot be a sum of these clients' returns, or this one has one of them.
        """
        other = RoundSum(self.plan)
        other.clients = frozenset(clients)
        for kind in {name.partition("/")[0] for name in tensors} & {"mean", "idle", "products"}:
            flat = {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(kind)}
            schema = self._summed if kind == "products" else self.plan.schema
            other._means[kind] = ExactMean.of(schema, self.plan.clients, flat)
        counts = {kind: mean.count for kind, mean in other._means.items()}
        products, rest = counts.pop("products", len(clients)), sum(counts.values())
        whole = 0 if self.plan.method.direction is not None else len(clients)
        if products != len(clients) or rest != whole or 0 in counts.values():
            raise ValueError(f"{counts} returns of {len(clients)} clients")
        for client, weight in clients.items() if self._names else ():
            update = {name: tensors[f"{client}/{name}"] for name in self._names}
            other._kept[client] = Return(received(client), update, weight)
        self.merge(other)


class _Lazily(Mapping[str, Tensor]):
    """The values of a mean, none of which is kept."""

    def __init__(self, names: Collection[str], mean: ExactMean) -> None:
        self._names, self._mean = names, mean

    def __getitem__(self, name: str) -> Tensor:
        return self._mean.value(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
