"""Sessions to test with: repeatable secrets, vectors, and a protocol stopped at any step."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from fedlpp_ray.privacy.secure import (
    STEPS,
    SecureClient,
    SecureServer,
    Session,
    Step,
    primitives,
    wire,
)
from fedlpp_ray.privacy.secure.primitives import RandomBytes, Vector


def seeded(seed: int) -> RandomBytes:
    return random.Random(seed).randbytes


def session_of(count: int, threshold: int, length: int = 5, **more: int) -> Session:
    """Clients 3, 10, 17, ...: their numbers are not their places."""
    clients = tuple(range(3, 3 + 7 * count, 7))
    return Session(more.pop("round", 4), clients, threshold, length, **more)  # type: ignore[arg-type]


def vectors_of(session: Session, seed: int = 0) -> dict[int, Vector]:
    """Anything at all: integers of every size, the largest included."""
    rng = np.random.default_rng(seed)
    largest = np.iinfo(session.dtype).max
    shape = (len(session.clients), session.length)
    rows = rng.integers(0, largest, shape, session.dtype, endpoint=True)
    return dict(zip(session.clients, rows, strict=True))


def plain_sum(session: Session, vectors: Mapping[int, Vector], clients: tuple[int, ...]) -> Vector:
    """With Python's integers, wrapped at the end."""
    columns = zip(*(vectors[client].tolist() for client in clients), strict=True)
    return np.array([sum(column) % 2**session.bits for column in columns], session.dtype)


class Halves:
    """Both halves of a session, driven by hand up to a step."""

    def __init__(self, session: Session, seed: int = 1) -> None:
        self.session, self.vectors = session, vectors_of(session)
        random_bytes = seeded(seed)
        self.server = SecureServer(session)
        self.clients = {c: SecureClient(session, c, random_bytes) for c in session.clients}
        self.inbound: dict[int, bytes] = dict.fromkeys(session.clients, b"")

    def send(self, client: int, step: Step) -> bytes:
        half, received = self.clients[client], self.inbound[client]
        if step == "keys":
            return half.keys()
        if step == "shares":
            return half.shares(received)
        if step == "masked":
            return half.masked(received, self.vectors[client])
        return half.unmask(received)

    def finish(self, step: Step, without: tuple[int, ...] = ()) -> dict[int, bytes]:
        """One step; returns what the clients sent."""
        sent = {c: self.send(c, step) for c in self.inbound if c not in without}
        for client, message in sent.items():
            self.server.receive(client, message)
        if step != "unmask":
            self.inbound = self.server.advance()
        return sent


def at(step: Step, count: int = 3, threshold: int = 2, **more: int) -> Halves:
    """A session whose earlier steps everybody has taken."""
    halves = Halves(session_of(count, threshold, **more))
    for earlier in STEPS[: STEPS.index(step)]:
        halves.finish(earlier)
    return halves


def told(halves: Halves, kind: wire.Kind, client: int, rows: dict[int, bytes]) -> bytes:
    """A message of the server's, well-formed, that says `rows`."""
    return wire.encode(halves.session, halves.server._heading(kind, client), rows)


def remember_primitives(patch: pytest.MonkeyPatch) -> None:
    """Functions of their arguments are computed once: thousands of sessions in seconds."""
    for name in ("agree", "public_key", "derive", "split"):
        patch.setattr(primitives, name, functools.cache(getattr(primitives, name)))
    combine: Callable[[tuple[tuple[int, bytes], ...]], bytes]
    combine = functools.cache(lambda shares: original(dict(shares)))
    original = primitives.combine
    patch.setattr(primitives, "combine", lambda shares: combine(tuple(shares.items())))
