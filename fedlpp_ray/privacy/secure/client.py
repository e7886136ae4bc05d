"""A client's half of secure aggregation."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedlpp_ray.errors import UserError
from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import primitives, wire
from fedlpp_ray.privacy.secure.masks import mask_key, own_mask, pair_mask
from fedlpp_ray.privacy.secure.primitives import SECRET, RandomBytes, Vector
from fedlpp_ray.privacy.secure.session import STEPS, Session, Step


class SecureClient:
    """What one client knows in one session, and what it does: four steps, each once, in order.

    A step that raises has changed nothing and has given nothing away. It pickles, secrets included;
    but a step taken again from an older copy uses masks and keys twice, which gives away what they
    hide. After a crash there is a new session, with new clients.

    Args:
        session: The aggregation.
        client: Which client of its cohort.
        random: Where secrets come from; the system's random numbers unless told. Tests alone give
            another one: who can repeat it can take the masks away.

    Raises:
        UserError: the client is not of the cohort, or the library is missing.
    """

    def __init__(
        self, session: Session, client: int, random: RandomBytes = secrets.token_bytes
    ) -> None:
        primitives.check_installed()
        if client not in session.clients:
            raise UserError(f"client {client} is not of the session's clients {session.clients}")
        self._session, self._client = session, client
        self._done: tuple[Step, ...] = ()
        self._secret, self._mask_secret = random(SECRET), random(SECRET)
        self._cipher_key = random(primitives.KEY)
        self._bound = session.digest()
        self._roster: dict[int, bytes] = {}
        self._shares: dict[int, bytes] = {}

    def keys(self) -> bytes:
        """Step 1: the public keys for encryption and for masks, and the commitment.

        Raises:
            MessageError: it has been taken.
        """
        self._check("keys")
        message = self._message("keys", {self._client: self._public()})
        self._done = STEPS[:1]
        return message

    def shares(self, roster: bytes) -> bytes:
        """Step 2: for each client of the roster, shares of both secrets, encrypted for it.

        Args:
            roster: The server's message with everybody's public keys.

        Raises:
            MessageError: it is not as expected, has fewer clients than the threshold, a key twice,
                or others for this client than it has sent; or it is not this step's turn.
        """
        self._check("shares")
        keys = self._read(roster, "roster", self._session.clients, self._session.threshold)
        if keys.get(self._client) != self._public():
            raise MessageError("the roster has other keys for this client than it has sent")
        if len({key for row in keys.values() for key in (row[:32], row[32:64])}) < 2 * len(keys):
            raise MessageError("the roster has a key twice")
        bound = self._session.digest(b"".join(keys.values()))
        shared = self._split()
        sealed = {
            peer: primitives.seal(self._channel(bound, keys, self._client, peer), shared[peer])
            for peer in keys
            if peer != self._client
        }
        self._bound, self._roster = bound, keys
        self._shares = {self._client: shared[self._client]}
        self._done = STEPS[:2]
        return self._message("shares", sealed)

    def masked(self, inbox: bytes, vector: Vector) -> bytes:
        """Step 3: the vector, masked.

        Args:
            inbox: The server's message with what the others have encrypted for this client.
            vector: (length,) of the session's dtype.

        Raises:
            MessageError: the message is not as expected, comes from fewer clients than the
                threshold, this one included, or its shares cannot be decrypted; or it is not this
                step's turn.
            ValueError: the vector has another dtype or shape.
        """
        self._check("masked")
        if vector.dtype != self._session.dtype or vector.shape != (self._session.length,):
            raise ValueError(f"{vector.dtype}, {vector.shape} is no vector of the session")
        peers = [peer for peer in self._roster if peer != self._client]
        sealed = self._read(inbox, "inbox", peers, self._session.threshold - 1)
        opened = {
            peer: primitives.unseal(
                self._channel(self._bound, self._roster, peer, self._client), content
            )
            for peer, content in sealed.items()
        }
        masked = vector + own_mask(self._session, self._bound, self._secret)
        for peer in opened:
            masked += self._pair_mask(peer)
        self._shares |= opened
        self._done = STEPS[:3]
        return self._message("masked", {self._client: masked})

    def unmask(self, survivors: bytes) -> bytes:
        """Step 4: of each client one share, of its own mask or of its mask key, never of both.

        Args:
            survivors: The server's message that says whose masked vectors have come. Of these it
                gets the shares of the own masks; of the others those of the mask keys.

        Raises:
            MessageError: the message is not as expected, names fewer clients than the threshold,
                or not this one; or it is not this step's turn: once answered, never again.
        """
        self._check("unmask")
        told = self._read(survivors, "survivors", sorted(self._shares), self._session.threshold)
        if self._client not in told:
            raise MessageError("this client's vector has not arrived: it has no part in the sum")
        given = {
            peer: share[SECRET:] if peer in told else share[:SECRET]
            for peer, share in self._shares.items()
        }
        self._done = STEPS
        self._secret = self._mask_secret = self._cipher_key = b""
        self._shares = {}
        return self._message("unmask", given)

    def _check(self, step: Step) -> None:
        turn = [*STEPS, None][len(self._done)]
        if step != turn:
            raise MessageError(
                f"step {step!r} is refused: client {self._client} has done "
                f"{', '.join(self._done) or 'none'}, each step is done once and in order"
            )

    def _public(self) -> bytes:
        keys = map(primitives.public_key, (self._cipher_key, mask_key(self._mask_secret)))
        return b"".join([*keys, primitives.commit(self._secret)])

    def _split(self) -> dict[int, bytes]:
        """By client, a share of the mask key's secret, then one of the own mask's."""
        session = self._session
        mask_key, own = (
            primitives.split(secret, session.threshold, len(session.clients))
            for secret in (self._mask_secret, self._secret)
        )
        points = {client: session.point(client) for client in session.clients}
        return {client: mask_key[point] + own[point] for client, point in points.items()}

    def _channel(self, bound: str, keys: Mapping[int, bytes], sender: int, receiver: int) -> bytes:
        """The key under which one client encrypts for another, one of which is this one."""
        peer = receiver if sender == self._client else sender
        secret = primitives.agree(self._cipher_key, keys[peer][: primitives.KEY])
        return primitives.derive(secret, "shares", bound, sender, receiver)

    def _pair_mask(self, peer: int) -> Vector:
        public = self._roster[peer][primitives.KEY : 2 * primitives.KEY]
        private = mask_key(self._mask_secret)
        return pair_mask(self._session, self._bound, private, public, (self._client, peer))

    def _read(
        self, payload: bytes, kind: wire.Kind, allowed: Sequence[int], least: int
    ) -> dict[int, bytes]:
        rows = wire.decode(payload, self._session, self._heading(kind), allowed, least)
        return {client: row.tobytes() for client, row in rows.items()}

    def _message(self, kind: wire.Kind, rows: Mapping[int, object]) -> bytes:
        return wire.encode(self._session, self._heading(kind), rows)

    def _heading(self, kind: wire.Kind) -> wire.Heading:
        return wire.Heading(kind, self._session.round, self._bound, self._client)
