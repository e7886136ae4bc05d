"""What a half refuses: a message that is damaged, forged, late, twice, or of somebody else."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from fedlpp_ray.errors import UserError
from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.secure import STEPS, SecureClient, Step, wire
from tests.privacy.sessions import Halves, at, plain_sum, session_of, told


def flipped(message: bytes, place: int, bit: int = 0) -> bytes:
    return message[:place] + bytes([message[place] ^ 1 << bit]) + message[place + 1 :]


@pytest.mark.parametrize("step", STEPS)
def test_no_flipped_bit_is_taken(step: Step) -> None:
    """By either half, whichever bit it is; and the good message is taken thereafter."""
    halves = at(step)
    message = halves.inbound[3]
    for place, bit in itertools.product(range(len(message)), range(8)):
        halves.inbound[3] = flipped(message, place, bit)
        with pytest.raises(MessageError):
            halves.send(3, step)
    halves.inbound[3] = message
    answer = halves.send(3, step)
    for place, bit in itertools.product(range(len(answer)), range(8)):
        with pytest.raises(MessageError) as caught:
            halves.server.receive(3, flipped(answer, place, bit))
        assert "\n" not in str(caught.value)
    halves.server.receive(3, answer)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("payload", [None, b"", b"12345678", bytes(10**5), {"keys": 1}])
def test_what_is_no_message_is_refused(step: Step, payload: object) -> None:
    with pytest.raises(MessageError):
        at(step).server.receive(3, payload)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", STEPS)
def test_a_message_twice_is_refused(step: Step) -> None:
    halves = at(step)
    message = halves.send(3, step)
    halves.server.receive(3, message)
    with pytest.raises(MessageError, match=f"client 3 has sent its '{step}' already"):
        halves.server.receive(3, message)
    with pytest.raises(MessageError, match="each step is done once and in order"):
        halves.send(3, step)


@pytest.mark.parametrize("step", STEPS)
def test_another_clients_message_is_refused(step: Step) -> None:
    halves = at(step)
    message = halves.send(10, step)
    with pytest.raises(MessageError, match="client is 10, expected 3"):
        halves.server.receive(3, message)
    with pytest.raises(MessageError, match=f"client 4 has no part in step '{step}'"):
        halves.server.receive(4, message)
    if step != "keys":
        halves.inbound[3] = halves.inbound[17]
        with pytest.raises(MessageError, match="client is 17, expected 3"):
            halves.send(3, step)


@pytest.mark.parametrize("step", STEPS)
def test_a_message_of_another_round_is_refused(step: Step) -> None:
    halves, earlier = at(step), at(step, round=3)
    with pytest.raises(MessageError, match="round is 3, expected 4"):
        halves.server.receive(3, earlier.send(3, step))
    if step != "keys":
        halves.inbound = at(step, round=3).inbound
        with pytest.raises(MessageError, match="round is 3, expected 4"):
            halves.send(3, step)


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_message_of_another_attempt_at_the_round_is_refused(step: Step) -> None:
    halves, earlier = Halves(session_of(3, 2)), Halves(session_of(3, 2), seed=2)
    for before in STEPS[: STEPS.index(step)]:
        halves.finish(before)
        earlier.finish(before)
    message = earlier.inbound[3]
    with pytest.raises(MessageError, match="session is '"):
        halves.server.receive(3, earlier.send(3, step))
    halves.inbound[3] = message
    reason = "other keys for this client" if step == "shares" else "session is '"
    with pytest.raises(MessageError, match=reason):
        halves.send(3, step)


def test_a_message_of_a_step_that_has_ended_is_refused() -> None:
    halves = at("masked")
    late = halves.finish("masked")[3]
    with pytest.raises(MessageError, match="kind is 'masked', expected 'unmask'"):
        halves.server.receive(3, late)


def test_a_client_that_dropped_out_stays_out() -> None:
    halves = at("masked")
    message = halves.send(3, "masked")
    halves.finish("masked", without=(3,))
    with pytest.raises(MessageError, match="client 3 has no part in step 'unmask'"):
        halves.server.receive(3, message)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda keys: keys | {10: keys[17]}, "a key twice"),
        (lambda keys: keys | {3: keys[3][:64] + bytes(32)}, "other keys for this client"),
        (lambda keys: {c: keys[c] for c in (10, 17)}, "other keys for this client"),
        (lambda keys: keys | {10: bytes(32) + keys[10][32:]}, "a public key is none"),
    ],
)
def test_a_false_roster_is_refused(
    change: Callable[[dict[int, bytes]], dict[int, bytes]], reason: str
) -> None:
    halves = at("shares")
    rows = change(halves.server._roster)
    halves.server._bound = halves.session.digest()
    with pytest.raises(MessageError, match=reason):
        halves.clients[3].shares(told(halves, "roster", 3, rows))


def test_clients_that_were_given_different_rosters_do_not_go_on() -> None:
    """Whatever a server says later, shares under one roster do not open under another."""
    halves = at("shares")
    bound, halves.server._bound = halves.server._bound, halves.session.digest()
    other = {**halves.server._roster, 17: halves.server._roster[17][:64] + bytes(32)}
    halves.clients[3].shares(told(halves, "roster", 3, other))
    halves.server._bound = bound
    sealed = wire.decode(
        halves.send(10, "shares"),
        halves.session,
        halves.server._heading("shares", 10),
        (3, 17),
        2,
    )[3].tobytes()
    halves.server._bound = halves.clients[3]._bound
    inbox = told(halves, "inbox", 3, {10: sealed})
    with pytest.raises(MessageError, match="damaged or not for this client"):
        halves.clients[3].masked(inbox, halves.vectors[3])


def test_forged_shares_do_not_open() -> None:
    """With a right digest: the server, or whoever rewrites its message, cannot change a share."""
    halves = at("masked")
    allowed = (10, 17)
    heading = halves.server._heading("inbox", 3)
    rows = wire.decode(halves.inbound[3], halves.session, heading, allowed, 2)
    sealed = {peer: row.tobytes() for peer, row in rows.items()}
    for forged in ({**sealed, 10: flipped(sealed[10], 5)}, {10: sealed[17], 17: sealed[10]}):
        with pytest.raises(MessageError, match="damaged or not for this client"):
            halves.clients[3].masked(told(halves, "inbox", 3, forged), halves.vectors[3])
    halves.finish("masked")  # the true message is taken after all


@pytest.mark.parametrize("about", [3, 17])  # a survivor; one whose mask key is opened
def test_a_false_share_gives_no_total(about: int) -> None:
    halves = at("masked", 3, 2)
    halves.finish("masked", without=(17,))
    halves.clients[10]._shares[about] = bytes(32)
    halves.finish("unmask")
    with pytest.raises(MessageError, match=f"the shares of client {about}'s secret do not give it"):
        halves.server.total()
    assert halves.server._sum.size == 0


def test_the_last_step_has_nothing_to_send_to_clients() -> None:
    with pytest.raises(MessageError, match="step 'unmask' ends by the total"):
        at("unmask").server.advance()


@pytest.mark.parametrize("vector", [np.zeros(5, np.int64), np.zeros(4, np.uint64)])
def test_a_vector_of_another_type_or_length_is_refused(vector: np.ndarray) -> None:
    halves = at("masked")
    with pytest.raises(ValueError, match="is no vector of the session"):
        halves.clients[3].masked(halves.inbound[3], vector)


def test_a_client_of_another_session_is_refused() -> None:
    with pytest.raises(UserError, match="client 4 is not of the session's clients"):
        SecureClient(session_of(2, 2), 4)


def test_a_session_goes_on_from_pickled_halves() -> None:
    halves = at("masked")
    halves.clients = pickle.loads(pickle.dumps(halves.clients))
    halves.server = pickle.loads(pickle.dumps(halves.server))
    halves.finish("masked", without=(10,))
    halves.finish("unmask")
    expected = plain_sum(halves.session, halves.vectors, (3, 17))
    assert halves.server.total().tolist() == expected.tolist()


def test_no_secret_is_sent_in_the_clear() -> None:
    halves = Halves(session_of(3, 2))
    known = {c: (h._secret, h._mask_secret, h._cipher_key) for c, h in halves.clients.items()}
    for step in STEPS:
        for message in halves.finish(step).values():
            assert not any(secret in message for three in known.values() for secret in three)
