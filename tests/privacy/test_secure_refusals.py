"""What a client gives away, once, and what it gives to no server whatever it is told."""

from __future__ import annotations

import pickle

import pytest

from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import primitives, wire
from fedlpp_ray.privacy.secure.masks import mask_key
from tests.privacy.sessions import Halves, at, session_of, told


def test_a_client_gives_one_share_of_each_and_answers_once() -> None:
    halves = at("unmask", 5, 3)
    client = halves.clients[3]
    own, masks = halves.clients[10]._secret, halves.clients[10]._mask_secret
    before = pickle.dumps(client)
    first = client.unmask(told(halves, "survivors", 3, dict.fromkeys((3, 10, 17), b"")))
    for again in ((3, 17, 24), (3, 10, 17), halves.session.clients):  # others, the same, all
        with pytest.raises(MessageError, match="step 'unmask' is refused: client 3 has done keys"):
            client.unmask(told(halves, "survivors", 3, dict.fromkeys(again, b"")))
    heading = halves.server._heading("unmask", 3)
    clients = halves.session.clients
    rows = wire.decode(first, halves.session, heading, clients, len(clients))
    held = pickle.loads(before)._shares
    for about, row in rows.items():  # of a survivor the own mask's, of another the mask key's
        expected = held[about][16:] if about in (3, 10, 17) else held[about][:16]
        assert row.tobytes() == expected
    assert own not in first
    assert masks not in first
    assert client._shares == {}
    assert client._secret == b""


def test_threshold_shares_of_the_own_masks_leave_the_mask_keys_unknown() -> None:
    halves = at("unmask", 3, 2)
    sent = halves.finish("unmask")
    assert all(halves.clients[c]._secret == b"" for c in sent)
    shares = {halves.session.point(c): halves.server._received[c][10] for c in (3, 17)}
    secret = primitives.combine(shares)
    assert primitives.commit(secret) == halves.server._roster[10][64:]
    assert primitives.public_key(mask_key(secret)) != halves.server._roster[10][32:64]


def test_a_client_refuses_fewer_than_the_threshold_at_every_step() -> None:
    halves = at("shares", 5, 4)
    rows = {c: halves.server._roster[c] for c in (3, 10, 17)}
    halves.server._bound = halves.session.digest()
    with pytest.raises(MessageError, match="count is 3; 4 to 5 clients are allowed"):
        halves.clients[3].shares(told(halves, "roster", 3, rows))
    halves = at("masked", 5, 4)
    inbox = told(halves, "inbox", 3, dict.fromkeys((10, 17), bytes(48)))
    with pytest.raises(MessageError, match="count is 2; 3 to 4 clients are allowed"):
        halves.clients[3].masked(inbox, halves.vectors[3])
    halves = at("unmask", 5, 4)
    with pytest.raises(MessageError, match="count is 3; 4 to 5 clients are allowed"):
        halves.clients[3].unmask(told(halves, "survivors", 3, dict.fromkeys((3, 10, 17), b"")))


def test_a_client_that_is_told_that_it_has_dropped_out_gives_nothing() -> None:
    halves = at("unmask")
    with pytest.raises(MessageError, match="this client's vector has not arrived"):
        halves.clients[3].unmask(told(halves, "survivors", 3, dict.fromkeys((10, 17), b"")))


def test_survivors_who_shared_nothing_are_refused() -> None:
    halves = Halves(session_of(4, 3))
    halves.finish("keys")
    halves.finish("shares", without=(24,))
    halves.finish("masked")
    rows = dict.fromkeys((3, 10, 24), b"")
    with pytest.raises(MessageError, match="clients that are not expected"):
        halves.clients[3].unmask(told(halves, "survivors", 3, rows))
