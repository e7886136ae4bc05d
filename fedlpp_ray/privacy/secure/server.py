"""The server's half of secure aggregation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import primitives, wire
from fedlpp_ray.privacy.secure.masks import mask_key, own_mask, pair_mask
from fedlpp_ray.privacy.secure.primitives import KEY, Vector
from fedlpp_ray.privacy.secure.session import STEPS, Session, Step, TooFewClientsError

_ANSWERS: dict[Step, wire.Kind] = {"keys": "roster", "shares": "inbox", "masked": "survivors"}


class SecureServer:
    """What the server knows in one session, and what it does.

    In each of the four steps it receives from whoever is left, in any order; `advance` ends the
    step and says what to send to whom; `total` ends the last. Who has not been heard of by then has
    dropped out. What is held grows with the cohort's square, but of vectors it is one, the sum.

    Args:
        session: The aggregation.

    Raises:
        UserError: the library is missing.
    """

    def __init__(self, session: Session) -> None:
        primitives.check_installed()
        self._session = session
        self._bound = session.digest()
        self._step: Step | None = "keys"
        self._awaited = session.clients
        self._received: dict[int, dict[int, bytes]] = {}
        self._roster: dict[int, bytes] = {}
        self._paired: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self._sum = np.zeros(session.length, session.dtype)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Whose vectors are in the sum; none before the step "masked" has ended."""
        return self._survivors

    def receive(self, client: int, payload: bytes) -> None:
        """Take what a client has sent in this step.

        Args:
            client: Who has sent it, as the transport says.
            payload: Its message.

        Raises:
            MessageError: the session has ended, the client has dropped out or has sent this step's
                message before, or the message is not as expected. Nothing has changed.
        """
        step = self._running()
        if client not in self._awaited:
            raise MessageError(f"client {client} has no part in step {step!r}")
        if client in self._received:
            raise MessageError(f"client {client} has sent its {step!r} already")
        heading = self._heading(step, client)
        allowed = self._rows_of(step, client)
        rows = wire.decode(payload, self._session, heading, allowed, len(allowed))
        if step == "masked":
            self._sum += rows.pop(client)
        self._received[client] = {about: row.tobytes() for about, row in rows.items()}

    def advance(self) -> dict[int, bytes]:
        """End the step "keys", "shares" or "masked".

        Returns:
            What to send to each client that is left.

        Raises:
            TooFewClientsError: fewer than the threshold are. The session has ended.
            MessageError: the session has ended, or this is its last step.
        """
        step = self._running()
        if step == "unmask":
            raise MessageError("step 'unmask' ends by the total")
        left = self._left()
        received, self._received = self._received, {}
        if step == "keys":
            self._roster = {client: received[client][client] for client in left}
        elif step == "shares":
            self._paired = left
        else:
            self._survivors = left
        rows = {client: self._answer(step, client, left, received) for client in left}
        if step == "keys":
            self._bound = self._session.digest(b"".join(self._roster.values()))
        self._awaited, self._step = left, STEPS[STEPS.index(step) + 1]
        return rows

    def total(self) -> Vector:
        """The sum of the survivors' vectors mod 2^bits, (length,). It ends the session.

        Raises:
            TooFewClientsError: fewer clients than the threshold have sent their shares.
            MessageError: shares do not give what their client has announced; or it is another
                step's turn.
        """
        step = self._running()
        if step != "unmask":
            raise MessageError(f"no total at step {step!r}: nothing has been unmasked")
        helpers = self._left()[: self._session.threshold]
        self._step = None
        try:
            return self._unmasked(helpers)
        finally:
            self._forget()

    def _unmasked(self, helpers: Sequence[int]) -> Vector:
        session, total = self._session, self._sum
        for client in self._paired:
            shares = {session.point(h): self._received[h][client] for h in helpers}
            secret = primitives.combine(shares)
            if client in self._survivors:
                self._check(client, primitives.commit(secret), 2)
                total -= own_mask(session, self._bound, secret)
                continue
            private = mask_key(secret)
            self._check(client, primitives.public_key(private), 1)
            for other in self._survivors:
                public = self._roster[other][KEY : 2 * KEY]
                total -= pair_mask(session, self._bound, private, public, (other, client))
        return total

    def _check(self, client: int, found: bytes, place: int) -> None:
        if found != self._roster[client][place * KEY : (place + 1) * KEY]:
            raise MessageError(f"the shares of client {client}'s secret do not give it: no total")

    def _answer(
        self, step: Step, client: int, left: Sequence[int], received: dict[int, dict[int, bytes]]
    ) -> bytes:
        if step == "keys":
            rows = self._roster
        elif step == "shares":
            rows = {peer: received[peer][client] for peer in left if peer != client}
        else:
            rows = dict.fromkeys(left, b"")
        return wire.encode(self._session, self._heading(_ANSWERS[step], client), rows)

    def _rows_of(self, step: Step, client: int) -> Sequence[int]:
        """Whose rows a client's message has."""
        if step == "shares":
            return [peer for peer in self._roster if peer != client]
        return self._paired if step == "unmask" else [client]

    def _running(self) -> Step:
        if self._step is None:
            raise MessageError("the session has ended")
        return self._step

    def _left(self) -> tuple[int, ...]:
        """Who has been heard of in this step; ends the session where they are too few."""
        left, least = tuple(sorted(self._received)), self._session.threshold
        if len(left) < least:
            step, self._step = self._step, None
            self._forget()
            raise TooFewClientsError(
                f"{len(left)} of {len(self._session.clients)} clients are left at step {step!r}; "
                f"the threshold is {least}: no sum"
            )
        return left

    def _forget(self) -> None:
        self._sum = np.zeros(0, self._session.dtype)
        self._received = {}

    def _heading(self, kind: wire.Kind, client: int) -> wire.Heading:
        return wire.Heading(kind, self._session.round, self._bound, client)
