"""The other ranks of a party that has several.

They are actors that rank 0, an actor too, makes and owns: so the driver deals with one actor a
party, whatever its number of ranks, and when that one ends so do the others. Or Ray Train has made
them all (`trainer.py`).
"""

from __future__ import annotations

import importlib
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from fedlpp_ray.errors import UserError

if TYPE_CHECKING:
    from fedlpp_ray.training import Group

_GRACE = 2.0
"""Seconds in which the reason why a rank ends still reaches rank 0."""
_NOTICED = 10.0
"""Seconds in which Ray Train, which looks every 2, notices that a rank is gone."""


OWN_GPU = {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
"""Ray shows an actor its own GPUs only, so each is the first of its process."""


class RankLost(RayError):  # type: ignore[misc]
    """A rank is gone, or failed alone, and with it its party."""


class Others(Protocol):
    """Of rank 0: the others.

    Attributes:
        group: All.
    """

    group: Group

    def begin(self, name: str, arguments: Sequence[Any]) -> None:
        """Have the others begin to follow; this process makes the party at the same time."""

    def check(self) -> None:
        """Say why a rank has failed, if one has; what failed here is then its consequence.

        Raises:
            RankLost: it is gone.
            UserError: what it refused.
        """


def follow(name: str, arguments: Sequence[Any], group: Group) -> None:
    """Be a party together with rank 0, until that ends it."""
    module, _, kind = name.partition(":")
    getattr(importlib.import_module(module), kind).follow(*arguments, group=group)


def join(rank: int, size: int, address: tuple[str, int]) -> Group:
    """Make this process a rank; returns the group when all have come."""
    import torch
    import torch.distributed as dist

    from fedlpp_ray.training import Group

    host, port = address
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), **OWN_GPU)
    gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=size)
    return Group.joined()


class Rank:
    """An actor that is one of the other ranks."""

    def join(self, rank: int, size: int, address: tuple[str, int]) -> None:
        """Become a rank."""
        self._group = join(rank, size, address)

    def follow(self, name: str, arguments: Sequence[Any]) -> None:
        """Be a party together with rank 0, until that ends it."""
        try:
            follow(name, arguments, self._group)
        except BaseException:
            # Who waits for a message of this rank learns of it when the process is gone.
            threading.Timer(_GRACE, os._exit, [1]).start()
            raise


class Ranks:
    """`Others` that rank 0 makes.

    Args:
        options: Of each of the others' actors, as Ray takes them.
    """

    def __init__(self, options: Sequence[Mapping[str, Any]]) -> None:
        self._actors = [ray.remote(Rank).options(**each).remote() for each in options]
        address, size = (ray.util.get_node_ip_address(), _free_port()), len(self._actors) + 1
        self._busy = [each.join.remote(i, size, address) for i, each in enumerate(self._actors, 1)]
        self.group = join(0, size, address)

    def begin(self, name: str, arguments: Sequence[Any]) -> None:
        """Have the others begin to follow."""
        ray.get(self._busy)
        self._busy = [actor.follow.remote(name, arguments) for actor in self._actors]

    def check(self) -> None:
        """Say why a rank has failed, if one has."""
        ready, _ = ray.wait(self._busy, num_returns=len(self._busy), timeout=_GRACE + 1)
        for reference in ready:
            try:
                ray.get(reference)
            except RayTaskError as error:
                number = self._busy.index(reference) + 1
                if isinstance(error.cause, UserError):
                    raise UserError(f"rank {number}: {error.cause}") from error
                raise RankLost(f"rank {number}: {error.cause}") from error
            except RayError as error:
                raise RankLost(str(error)) from error


class Joined:
    """`Others` that Ray Train has made: each of them does `obey`.

    Args:
        group: All.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def begin(self, name: str, arguments: Sequence[Any]) -> None:
        """Have the others begin to follow."""
        self.group.tell(name, arguments)

    def check(self) -> None:
        """Wait: where another rank is gone, Ray Train ends this one, too, and says why."""
        time.sleep(_NOTICED)


def obey(group: Group) -> None:
    """Of a rank of `Joined` other than the first: be each party that rank 0 begins."""
    while True:
        name, arguments = group.hear()
        try:
            follow(name, arguments, group)
        except UserError:
            time.sleep(_GRACE)  # rank 0 is likely to refuse the same, and to be heard first
            raise


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
