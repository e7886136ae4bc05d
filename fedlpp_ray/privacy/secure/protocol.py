"""Both halves of secure aggregation in one process, and the bytes that it takes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlpp_ray.messages import Transfer
from fedlpp_ray.privacy.secure import wire
from fedlpp_ray.privacy.secure.client import SecureClient
from fedlpp_ray.privacy.secure.primitives import RandomBytes, Vector
from fedlpp_ray.privacy.secure.server import SecureServer
from fedlpp_ray.privacy.secure.session import STEPS, Session, Step


@dataclass(frozen=True)
class Outcome:
    """What a session came to.

    Attributes:
        total: Sum of the survivors' vectors mod 2^bits, (length,).
        survivors: Whose vectors are in it.
        ledger: What each client of the cohort received and sent.
    """

    total: Vector
    survivors: tuple[int, ...]
    ledger: tuple[Transfer, ...]


def run(
    session: Session,
    vectors: Mapping[int, Vector],
    drops: Mapping[int, Step] | None = None,
    random: RandomBytes = secrets.token_bytes,
) -> Outcome:
    """One session from keys to total.

    Args:
        session: The aggregation.
        vectors: By client, (length,) of the session's dtype.
        drops: The step from which on a client sends nothing, for those that drop out. What the
            server sends for that step it has still received.
        random: Where secrets come from; the outcome's total does not depend on it.

    Raises:
        TooFewClientsError: fewer clients than the threshold are left at some step.
    """
    drops = drops or {}
    server = SecureServer(session)
    clients = {client: SecureClient(session, client, random) for client in session.clients}
    inbound = dict.fromkeys(session.clients, b"")
    down, up = dict.fromkeys(session.clients, 0), dict.fromkeys(session.clients, 0)
    for step in STEPS:
        for client, received in inbound.items():
            down[client] += len(received)
            if drops.get(client) != step:
                sent = _step(clients[client], step, received, vectors[client])
                up[client] += len(sent)
                server.receive(client, sent)
        if step != "unmask":
            inbound = server.advance()
    ledger = tuple(Transfer(client, down[client], up[client]) for client in session.clients)
    return Outcome(server.total(), server.survivors, ledger)


def traffic(session: Session) -> tuple[Transfer, ...]:
    """What each client receives and sends in a session in which nobody drops out, in bytes.

    With n clients: up, length * bits / 8 + 80 n; down, 168 n; and headers, below 2 kB each.
    """
    return tuple(_transfer(session, client) for client in session.clients)


def _transfer(session: Session, client: int) -> Transfer:
    everybody, others = session.clients, session.others(client)
    return Transfer(
        client,
        down=_size(session, "roster", client, everybody)
        + _size(session, "inbox", client, others)
        + _size(session, "survivors", client, everybody),
        up=_size(session, "keys", client, [client])
        + _size(session, "shares", client, others)
        + _size(session, "masked", client, [client])
        + _size(session, "unmask", client, everybody),
    )


def _size(session: Session, kind: wire.Kind, client: int, about: Sequence[int]) -> int:
    dtype, shape = wire.row_of(kind, session)
    heading = wire.Heading(kind, session.round, session.digest(), client)
    return len(wire.encode(session, heading, dict.fromkeys(about, np.zeros(shape, dtype))))


def _step(client: SecureClient, step: Step, received: bytes, vector: Vector) -> bytes:
    if step == "keys":
        return client.keys()
    if step == "shares":
        return client.shares(received)
    if step == "masked":
        return client.masked(received, vector)
    return client.unmask(received)
