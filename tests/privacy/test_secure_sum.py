"""The secure sum is the plain sum, whoever drops out, or there is none."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from fedlpp_ray.privacy.secure import (
    STEPS,
    SecureServer,
    Session,
    Step,
    TooFewClientsError,
    run,
    traffic,
)
from tests.privacy.sessions import (
    Halves,
    plain_sum,
    remember_primitives,
    seeded,
    session_of,
    vectors_of,
)

Pattern = tuple[Step | None, ...]
"""By client: the step from which on it sends nothing; None: it stays."""
OUTCOMES = (*STEPS, None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_primitives(monkeypatch)


def patterns(count: int) -> Iterator[Pattern]:
    """Every pattern; from 5 clients on every number of clients by step, in an order at random."""
    if count < 5:
        yield from itertools.product(OUTCOMES, repeat=count)
        return
    rng = random.Random(count)
    for chosen in itertools.combinations_with_replacement(OUTCOMES, count):
        yield tuple(rng.sample(chosen, count))


def first_short_step(pattern: Pattern, threshold: int) -> Step | None:
    left = len(pattern)
    for step in STEPS:
        left -= Counter(pattern)[step]
        if left < threshold:
            return step
    return None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("count", "threshold"), [(n, t) for n in range(2, 7) for t in range(n // 2 + 1, n + 1)]
)
def test_the_sum_is_that_of_the_survivors_or_there_is_none(count: int, threshold: int) -> None:
    session = session_of(count, threshold)
    vectors = vectors_of(session)
    for pattern in patterns(count):
        drops = {c: step for c, step in zip(session.clients, pattern, strict=True) if step}
        short = first_short_step(pattern, threshold)
        if short:
            with pytest.raises(TooFewClientsError, match=f"at step '{short}'.* no sum"):
                run(session, vectors, drops, seeded(1))
            continue
        outcome = run(session, vectors, drops, seeded(1))
        survivors = tuple(c for c in session.clients if drops.get(c) in (None, "unmask"))
        assert outcome.survivors == survivors
        assert outcome.total.tolist() == plain_sum(session, vectors, survivors).tolist()


@pytest.mark.parametrize("bits", [32, 64])
def test_the_sum_does_not_depend_on_the_secrets(bits: int) -> None:
    session = session_of(4, 3, bits=bits)
    vectors = vectors_of(session)
    drops: dict[int, Step] = {10: "masked"}
    totals = [run(session, vectors, drops, seeded(seed)).total for seed in range(3)]
    totals.append(run(session, vectors, drops).total)  # the system's random numbers
    for total in totals:
        assert total.dtype == session.dtype
        assert total.tolist() == plain_sum(session, vectors, (3, 17, 24)).tolist()


def test_the_order_of_arrival_does_not_matter() -> None:
    session = session_of(4, 3)
    halves = Halves(session)
    for step in STEPS:
        sent = {c: halves.send(c, step) for c in halves.inbound}
        for client in random.Random(step).sample(sorted(sent), len(sent)):
            halves.server.receive(client, sent[client])
        if step != "unmask":
            halves.inbound = halves.server.advance()
    expected = plain_sum(session, halves.vectors, session.clients)
    assert halves.server.total().tolist() == expected.tolist()


def test_masked_vectors_look_uniform() -> None:
    """Chi-square on bytes: 255 degrees of freedom, mean 255, deviation 22.6; 400 is 6.4 of them."""
    session = session_of(3, 2, length=20_000)
    halves = Halves(session)
    halves.vectors = {client: np.zeros(20_000, session.dtype) for client in session.clients}
    halves.finish("keys")
    halves.finish("shares")
    sent = halves.finish("masked")
    held = [halves.server._sum.tobytes()]  # all that the server keeps of the vectors
    for content in [message[-160_000:] for message in sent.values()] + held:
        counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256)
        expected = len(content) / 256
        assert 130 < ((counts - expected) ** 2 / expected).sum() < 400


def test_a_vector_that_is_guessed_is_not_confirmed_by_the_masks_of_others() -> None:
    """Pairwise masks cancel in the sum of all masked vectors; the own masks hide it until then."""
    session = session_of(3, 2)
    halves = Halves(session)
    for step in STEPS[:3]:
        halves.finish(step)
    expected = plain_sum(session, halves.vectors, session.clients)
    assert (halves.server._sum != expected).all()


@pytest.mark.parametrize("step", STEPS)
def test_after_too_few_clients_the_server_holds_no_sum_and_goes_on_no_more(step: Step) -> None:
    halves = Halves(session_of(3, 2))
    for earlier in STEPS[: STEPS.index(step)]:
        halves.finish(earlier)
    halves.server.receive(3, halves.send(3, step))
    late = halves.send(10, step)
    with pytest.raises(TooFewClientsError, match="1 of 3 clients are left at step"):
        halves.server.total() if step == "unmask" else halves.server.advance()
    assert halves.server._sum.size == 0
    for attempt in (
        halves.server.total,
        halves.server.advance,
        lambda: halves.server.receive(10, late),
    ):
        with pytest.raises(ValueError, match="the session has ended"):
            attempt()


def test_no_total_before_unmasking() -> None:
    halves = Halves(session_of(2, 2))
    for step in STEPS[:3]:
        with pytest.raises(ValueError, match=f"no total at step '{step}'"):
            halves.server.total()
        halves.finish(step)


@pytest.mark.parametrize(("count", "length", "bits"), [(2, 1, 64), (3, 700, 32), (12, 33, 64)])
def test_traffic_is_what_a_session_takes(count: int, length: int, bits: int) -> None:
    session = session_of(count, count, length, bits=bits)
    outcome = run(session, vectors_of(session), random=seeded(1))
    assert outcome.ledger == traffic(session)
    for transfer in outcome.ledger:
        assert 0 < transfer.up - (length * bits // 8 + 80 * count) < 2000
        assert 0 < transfer.down - 168 * count < 2000


@pytest.mark.parametrize(
    ("clients", "threshold", "length", "bits", "message"),
    [
        ((1,), 1, 1, 64, "clients: at least 2"),
        ((2, 1), 2, 1, 64, "ascending"),
        ((1, 1), 2, 1, 64, "different"),
        ((-1, 1), 2, 1, 64, "from 0 on"),
        ((1, 2, 3, 4), 2, 1, 64, "threshold is 2; of 4 clients it is from 3 to 4"),
        ((1, 2, 3), 4, 1, 64, "threshold is 4; of 3 clients it is from 2 to 3"),
        ((1, 2), 2, 0, 64, "length is 0"),
        ((1, 2), 2, 1, 16, "bits is 16; 32 or 64"),
    ],
)
def test_a_session_that_cannot_be_is_refused(
    clients: tuple[int, ...], threshold: int, length: int, bits: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Session(0, clients, threshold, length, bits)  # type: ignore[arg-type]


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "Crypto.Protocol.DH", None)
    with pytest.raises(ValueError, match=r"pip install 'fedlpp_ray\[privacy\]'"):
        SecureServer(session_of(2, 2))
