"""A party of a run in a process of its own."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.records import ClientReport, report
from fedlpp_ray.runtime.ranks import Others, Ranks

SERVER = "fedlpp_ray.federation.server:Server"
CLIENT_HOST = "fedlpp_ray.federation.client:ClientHost"
SOLO = "fedlpp_ray.federation.solo:Solo"
AGGREGATOR = "fedlpp_ray.federation.aggregator:Aggregator"


@dataclass(frozen=True)
class Place:
    """Where an actor runs: its node, and the GPUs that it shares with others."""

    node: str
    gpus: tuple[str, ...]


class OutOfMemoryError(RuntimeError):
    """A party does not fit into the memory of its device.

    Attributes:
        place: Where.
    """

    def __init__(self, reason: str, place: Place) -> None:
        super().__init__(reason, place)
        self.place = place

    def __str__(self) -> str:
        return str(self.args[0])


class Party:
    """A server or a client host, imported only where it runs, and made anew by every `start`.

    An actor outlives its party: what takes seconds to import serves the next run too.

    Args:
        others: Of a party of ranks, the options of the actors that are the others.
        ranks: The others, where they are there already.
    """

    def __init__(
        self, others: Sequence[Mapping[str, Any]] | None = None, ranks: Others | None = None
    ) -> None:
        self._others, self._ranks = others, ranks
        self._party: Any = None

    def start(self, name: str, *arguments: Any) -> Place:
        """Make the party. Not in the constructor, whose errors reach a caller as text only.

        Args:
            name: `module:class`.
            arguments: The party's own.
        """
        module, _, kind = name.partition(":")
        place, together = _place(), {}
        with self._in_step():
            if self._ranks and self._party:
                self._party.close()
            self._party = None  # the old one goes before the new one comes
            gc.collect()
            if self._others is not None and not self._ranks:
                self._ranks = Ranks(self._others)
            if self._ranks:
                self._ranks.begin(name, arguments)
                together = {"group": self._ranks.group}
            try:
                self._party = getattr(importlib.import_module(module), kind)(*arguments, **together)
            except Exception as error:
                # torch's; it is not imported for this
                if type(error).__name__ == "OutOfMemoryError":
                    raise OutOfMemoryError(str(error), place) from error
                raise
        return place

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Look at the other ranks where this one fails: the reason may be there.

        Raises:
            RankLost, UserError: as `Others.check`.
        """
        try:
            yield
        except UserError:
            raise
        except Exception:
            if self._ranks:
                self._ranks.check()
            raise

    def peak(self) -> int:
        """Peak memory of this process, in bytes: of its GPU once it uses one."""
        from fedlpp_ray.training import process_peak

        return process_peak()

    def answer(self) -> None:
        """Be there."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the party, and wait for what it only begins.

        References in a mapping are resolved.
        """
        with self._in_step():
            result = getattr(self._party, method)(*map(_resolved, arguments))
            if isinstance(result, Iterator):
                return list(result)
            return result() if callable(result) else result

    def evaluate(self, *arguments: Any) -> tuple[Any, Any, Any, float, float]:
        """Evaluate a client: before and after training, what leaks; seconds of that, and of all."""
        start = time.perf_counter()
        with self._in_step():
            found = self._party.evaluate(*arguments)
        return (*found, time.perf_counter() - start)

    def train(self, *arguments: Any) -> tuple[ClientReport, bytes]:
        """Train a client: two results, so that the update goes to the server alone."""
        with self._in_step():
            update = self._party.train(*arguments)
        return report(update), update.payload


def _resolved(argument: Any) -> Any:
    if isinstance(argument, Mapping) and any(
        isinstance(v, ray.ObjectRef) for v in argument.values()
    ):
        return dict(zip(argument, ray.get(list(argument.values())), strict=True))
    return argument


def _place() -> Place:
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return Place(context.get_node_id(), tuple(map(str, gpus)))
