"""What an aggregation method is: a value of functions, each with a default that is FedIT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedlpp_ray.aggregation.mean import weighted_mean
from fedlpp_ray.aggregation.products import Matrix, Product
from fedlpp_ray.state import Part, State

Parts = frozenset[Part]
EVERYTHING: Parts = frozenset({"A", "B", "adapter", "head"})


@dataclass(frozen=True)
class Return:
    """What the server knows of one client's round, padded to the server's rank (`products.pad`).

    Attributes:
        received: D_i, the broadcast that the client decoded, and what a client has from the seed.
        update: K_i - D_i, of the parts that it trained.
        weight: n_i, or 1 with `server.weighting` uniform. Not divided by the sum: who else will
            return is not known when a return arrives.
    """

    received: State
    update: State
    weight: float

    @property
    def returned(self) -> State:
        """K_i, all parts."""
        return self.received | {name: self.received[name] + u for name, u in self.update.items()}


Contribution = Callable[[Return, State], tuple[float, State]]
"""(a return, the server's own broadcast D) to its weight w_i >= 0 and x_i, with names and shapes of
the update. K - D is sum_i w_i x_i / sum_i w_i; where all w_i are 0, they count as equal."""

Direction = Callable[[Sequence[Return], State], State]
"""(all returns, sorted by client, and the server's own broadcast D) to K - D, float64, of the parts
that were trained."""

Target = Callable[[str], Product | Matrix]
"""A layer's name to its next product, by the server's rule on products."""

Refit = Callable[[State, Target, torch.Generator], State]
"""(the next state by the server's rule on factors, the next products by the same rule, random
numbers of the round) to the next state, fp32."""


def own_update(each: Return, _broadcast: State) -> tuple[float, State]:
    """w_i = p_i, x_i = K_i - D_i."""
    return each.weight, each.update


def mean_update(returns: Sequence[Return], _broadcast: State) -> State:
    """K - D = sum_i p_i (K_i - D_i) / sum_i p_i, float64: what `own_update` comes to."""
    return weighted_mean([each.update for each in returns], [each.weight for each in returns])


def keep(state: State, _target: Target, _random: torch.Generator) -> State:
    """The next state is that of the factors."""
    return state


def always(*parts: Part) -> Callable[[int], Parts]:
    """The same parts in every round."""
    return lambda _round: frozenset(parts)


_ALL = always(*EVERYTHING)


@dataclass(frozen=True)
class Method:
    """One way of federating LoRA.

    Attributes:
        travels: Parts of the server's state, which are broadcast.
        personal: Parts that a client keeps to itself from round to round.
        trained: Round to the parts that a client trains; what of them travels, it returns.
        contribution: What a return adds to the mean that K - D is. Returns are added as they
            arrive and forgotten.
        direction: How all returns together become K - D, in the place of `contribution`, for what
            is no mean of one value a client. The server then keeps every return of a round.
        refit: What becomes of the state after the server's rule.
        mixed_ranks: Whether clients may have smaller ranks than the server.
        writes_base: Whether `refit` changes residuals: what the adapter cannot hold is added to
            the server's base, and a client has it only if it is sent.
    """

    travels: Parts = EVERYTHING
    personal: Parts = frozenset()
    trained: Callable[[int], Parts] = _ALL
    contribution: Contribution = own_update
    direction: Direction | None = None
    refit: Refit = keep
    mixed_ranks: bool = False
    writes_base: bool = False

    @property
    def averages(self) -> bool:
        """Whether K - D is the weighted mean of the updates."""
        return self.contribution is own_update and self.direction is None
