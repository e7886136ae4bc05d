"""A party of a run in a process of its own."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from fedlpp_ray.federation.records import ClientReport, report

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
    """

    def start(self, name: str, *arguments: Any) -> Place:
        """Make the party. Not in the constructor, whose errors reach a caller as text only.

        Args:
            name: `module:class`.
            arguments: The party's own.
        """
        self._party: Any = None  # the old one goes before the new one comes
        gc.collect()
        module, _, kind = name.partition(":")
        place = _place()
        try:
            self._party = getattr(importlib.import_module(module), kind)(*arguments)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported for this
                raise OutOfMemoryError(str(error), place) from error
            raise
        return place

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
        result = getattr(self._party, method)(*map(_resolved, arguments))
        if isinstance(result, Iterator):
            return list(result)
        return result() if callable(result) else result

    def evaluate(self, *arguments: Any) -> tuple[Any, Any, float]:
        """Evaluate a client: what it has before and after training, and the seconds it took."""
        start = time.perf_counter()
        return (*self._party.evaluate(*arguments), time.perf_counter() - start)

    def train(self, *arguments: Any) -> tuple[ClientReport, bytes]:
        """Train a client: two results, so that the update goes to the server alone."""
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
