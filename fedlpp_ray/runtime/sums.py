"""Where a round's updates are added up: at the server, or before on the nodes of their clients."""

from __future__ import annotations

from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlpp_ray.runtime.party import AGGREGATOR, Party
from fedlpp_ray.runtime.pool import in_words
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.server import ServerActor


class Sums(Protocol):
    """Takes a round's updates."""

    def add(self, client: int, node: str, payload: Any) -> Any:
        """Add an update that is on a node; returns the reference of the verdict on it."""

    def lost(self, client: int) -> list[int]:
        """Clients whose updates are lost, now that the verdict on one's has not come."""

    def collect(self) -> dict[int, str]:
        """Bring all to the server; returns why, by client, for those that are lost instead."""


class AtServer:
    """Every update goes to the server."""

    def __init__(self, server: ServerActor, round: int) -> None:
        self._server, self._round = server, round

    def add(self, client: int, node: str, payload: Any) -> Any:
        """Add an update; returns the reference of the verdict on it."""
        return self._server.send("verdict", self._round, client, payload)

    def lost(self, client: int) -> list[int]:
        """The client's own, unless the server has it and only its answer was lost."""
        return [] if client in self._server.ask("returned", self._round) else [client]

    def collect(self) -> dict[int, str]:
        """There is nothing to collect."""
        return {}


class OnNodes:
    """One actor a node adds up the updates there, and the server gets its sum.

    The actors stay from round to round.
    """

    def __init__(self, server: ServerActor, reactor: Reactor) -> None:
        self._server, self._reactor = server, reactor
        self._actors: dict[str, Any] = {}
        self._clients: dict[str, list[int]] = {}

    def open(self, round: int, opening: Any) -> None:
        """Begin a round; its opening is given as a reference."""
        self._round, self._opening, self._clients = round, opening, {}
        if self._actors:
            there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            for node in set(self._actors) - there:
                self._end(node)

    def add(self, client: int, node: str, payload: Any) -> Any:
        """Add an update; returns the reference of the verdict on it."""
        if node not in self._clients:
            self._clients[node] = []
            self._actor(node).start.remote(AGGREGATOR, self._opening)
        self._clients[node].append(client)
        return self._actor(node).call.remote("verdict", client, payload)

    def lost(self, client: int) -> list[int]:
        """All that were added where the client's was: what that actor holds is not known."""
        self._server.check()
        for node, clients in self._clients.items():
            if client in clients:
                self._end(node)
                return self._clients.pop(node)
        return [client]

    def collect(self) -> dict[int, str]:
        """Bring the sums to the server; returns why, by client, for those that are lost instead."""
        lost: dict[int, str] = {}
        partials = {n: self._actor(n).call.remote("partial") for n in self._clients}
        for node, partial in partials.items():
            merged = self._server.send("merge", self._round, partial)
            try:
                self._reactor.get(merged)
            except ray.exceptions.RayError as error:
                held = self._server.ask("returned", self._round)  # where only the answer was lost
                why = f"the sum of its node was lost: {in_words(error)}"
                lost |= {client: why for client in self._clients[node] if client not in held}
                self._end(node)
        self._clients = {}
        return lost

    def close(self) -> None:
        """End the actors."""
        for node in list(self._actors):
            self._end(node)

    def _actor(self, node: str) -> Any:
        if node not in self._actors:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = ray.remote(Party).options(num_cpus=0, scheduling_strategy=there)
            self._actors[node] = options.remote()
        return self._actors[node]

    def _end(self, node: str) -> None:
        ray.kill(self._actors.pop(node))
