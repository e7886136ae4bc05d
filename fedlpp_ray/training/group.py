"""Several processes that are one party: its ranks.

Rank 0 leads: it alone is asked, and has the others do the same at the same time (`together`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedlpp_ray.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
_PATIENCE = timedelta(days=365)
"""How long ranks wait to be told what to do."""
_STEP = timedelta(minutes=30)
"""How long a rank waits for the others within a step, as torch.distributed does by default."""


class Group:
    """The ranks of a party, of which this process is one; by default the only one.

    Attributes:
        rank: Of this process.
        size: Number of ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        # What is not for a device goes by gloo: who waits there takes no GPU's time.
        self._control = dist.new_group(backend="gloo", timeout=_PATIENCE) if size > 1 else None

    @classmethod
    def joined(cls) -> Group:
        """The processes of torch.distributed's default group; all of them call this."""
        return cls(dist.get_rank(), dist.get_world_size())

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The function of each item, in their order, on every rank; the ranks share the work.

        All make the same number of calls, as a sharded model needs: at the end perhaps of an item
        that another has too.

        Args:
            function: Of the item alone, so that it does not matter which rank calls it.
            items: The same on all ranks.
        """
        if self._control is None:
            return [function(item) for item in items]
        turns = range(self.rank, len(items) + -len(items) % self.size, self.size)
        found = self.gather([function(items[min(turn, len(items) - 1)]) for turn in turns])
        return [found[turn % self.size][turn // self.size] for turn in range(len(items))]

    def gather(self, own: T) -> list[T]:
        """What each rank has, by rank, on every rank."""
        if self._control is None:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self._control)
        return found

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's of some items."""
        return items[self.rank :: self.size]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, of which all ranks have as many: whether it holds on any rank."""
        if self._control is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        # By gloo: a GPU would have to be waited for to read what it has.
        dist.all_reduce(found, dist.ReduceOp.MAX, self._control, async_op=True).wait(_STEP)
        return [bool(flag) for flag in found.tolist()]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor its sum over the ranks, in place, with one message for all."""
        if self._control is None or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def tell(self, *message: Any) -> None:
        """Of rank 0: have the others `hear` a message."""
        if self._control is not None and self.rank == 0:
            dist.broadcast_object_list([message], src=0, group=self._control)

    def hear(self) -> tuple[Any, ...]:
        """Of the other ranks: wait for what rank 0 tells."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._control)
        return heard[0]  # type: ignore[no-any-return]


ALONE = Group()


class Grouped(Protocol):
    """A party that is the same object on each of its ranks."""

    group: Group


G = TypeVar("G", bound=Grouped)


def together(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """A method that all ranks run at the same time, with the arguments that rank 0 is given.

    It calls no other such method.
    """

    @functools.wraps(method)
    def run(self: G, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.group.tell(method.__name__, args, kwargs)
        return method(self, *args, **kwargs)

    return run


def follow(party: Grouped) -> None:
    """Of all ranks but 0: do what rank 0 does `together`, until it `dismiss`es them.

    Raises:
        Exception: this rank failed where rank 0 may not have, so the group cannot go on.
    """
    while message := party.group.hear():
        name, args, kwargs = message
        try:
            getattr(type(party), name).__wrapped__(party, *args, **kwargs)
        except UserError:  # what is refused, rank 0 refuses too
            continue


def dismiss(group: Group) -> None:
    """Of rank 0: end the others' `follow`."""
    group.tell()
