"""Thousands of hostile updates: each is refused with a MessageError, and none changes a bit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.aggregator import Aggregator
from fedlpp_ray.federation.records import Assignment
from fedlpp_ray.federation.server import Server
from fedlpp_ray.messages import MessageError
from fedlpp_ray.state import state_digest
from tests.federation.test_aggregator import made_up

HONEST, VICTIM, LAZY = (0, 1), 2, 3
"""Who returns what it should, in whose name the attacks come, and who returns nothing."""
UPLINKS = {
    "fp32": {"uplink.bits": 32},
    "nf4": {"uplink.bits": 4},
    "ternary fp16": {"uplink.bits": "ternary", "uplink.scale": "fp16"},
    "int8 double": {"uplink.bits": 8, "uplink.kind": "int", "uplink.scale": "double"},
}


class Target:
    """A server in round 2, in which one has returned.

    Attributes:
        server: The one.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.server = Server(experiment)
        self._state, self._broadcast = dict(self.server._state), self.server.encode_broadcast(2)
        self._updates = {client: self.update(client) for client in HONEST}
        self.reopen()

    def update(self, client: int, started: int = 2) -> bytes:
        """What a client would honestly send."""
        return made_up(self.server, client, started)

    def reopen(self) -> None:
        """The same round from its beginning."""
        cohort = [Assignment(client, 2) for client in (*HONEST, VICTIM, LAZY)]
        self.server._state = dict(self._state)
        self.server.open_round(2, cohort, {2: self._broadcast})
        self.server.receive(2, HONEST[0], self._updates[HONEST[0]])

    @property
    def aggregator(self) -> Aggregator:
        """What has received."""
        assert self.server._aggregator is not None
        return self.server._aggregator

    def held(self) -> str:
        """Of everything that an update could change."""
        return state_digest(self.aggregator.total.tensors()) + state_digest(self.server._state)

    def finish(self) -> str:
        """The digest with the rest of the honest; then the round begins anew."""
        self.server.receive(2, HONEST[1], self._updates[HONEST[1]])
        digest = self.server.aggregate(2)
        self.reopen()
        return digest

    def refuses(self, client: Any, payload: Any) -> None:
        """With words that can be logged."""
        with pytest.raises(MessageError) as error:
            self.server.receive(2, client, payload)
        text = str(error.value)
        assert len(text) < 1500
        text.encode()  # no lone surrogate
        assert "\n" not in text


@pytest.fixture(scope="module", params=UPLINKS)
def target(request: pytest.FixtureRequest, tiny_experiment: Experiment) -> Target:
    """With a bias of one block, so that a shape holds a 1."""
    return Target(tiny_experiment.with_values(UPLINKS[request.param]))


Listing = dict[str, Any]


def take_apart(payload: bytes) -> tuple[Listing, dict[str, Any], bytes]:
    """The header's tensors, the message's own header, and the data."""
    start = data_start(payload)
    listing = json.loads(payload[8:start])
    return listing, json.loads(listing.pop("__metadata__")["fedlpp"]), payload[start:]


def data_start(payload: bytes) -> int:
    return 8 + int.from_bytes(payload[:8], "little")


def join(text: str, data: bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def written(listing: Listing, header: object, data: bytes) -> bytes:
    return join(json.dumps({"__metadata__": {"fedlpp": json.dumps(header)}, **listing}), data)


DEEP = json.loads("[" * 400 + "]" * 400)
ODD = [True, False, None, -1, 0, 1.0, 2**31, 2**63, 2**64, 10**40, 1e308, math.nan, math.inf, "",
       "1", "\ud800", "\n" * 50, "x" * 3000, [], {}, [[]], {"a": 1}, DEEP]  # fmt: skip


def truncated(rng: random.Random, payload: bytes) -> bytes:
    return payload[: rng.randrange(len(payload))]


def extended(rng: random.Random, payload: bytes) -> bytes:
    more = rng.randbytes(rng.choice([1, 8, 1000, 100_000]))
    return payload + more if rng.random() < 0.5 else more + payload


def flipped_header(rng: random.Random, payload: bytes) -> bytes:
    """Up to three bits, none in the blanks at the header's end, where another blank is as good."""
    end = len(payload[: data_start(payload)].rstrip(b" "))
    changed = bytearray(payload)
    for place in rng.sample(range(end), rng.randint(1, 3)):
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def absurd_length(rng: random.Random, payload: bytes) -> bytes:
    length = rng.choice([0, 1, 7, 2**16, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, len(payload)])
    return length.to_bytes(8, "little") + payload[8:]


def hostile_json(rng: random.Random, payload: bytes) -> bytes:
    depth = rng.choice([10, 500, 990, 5000])
    text = rng.choice(
        ["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth,
         '{"a":' * depth + "1" + "}" * depth, "9" * depth, "null", "[]", "{}", '"x"', "true",
         "NaN", "-" * depth, "\x00" * depth,
         '{"__metadata__":{"fedlpp":"' + "[" * depth + '"}}', '{"__metadata__":{"fedlpp":1}}',
         '{"__metadata__":[]}', '{"__metadata__":{"fedlpp":"{}"}}', "\ud800", "\ufeff{}"]
    )  # fmt: skip
    return join(text, payload[data_start(payload) :])


def doubled_key(rng: random.Random, payload: bytes) -> bytes:
    listing, header, data = take_apart(payload)
    name = rng.choice(list(listing))
    outer, inner = json.dumps(listing)[1:-1], json.dumps(header)
    if rng.random() < 0.5:
        field = rng.choice(list(header))
        inner = f'{{"{field}": {json.dumps(rng.choice(ODD[:9]))}, {inner[1:]}'
    else:
        outer = f"{json.dumps(name)}: {json.dumps(rng.choice(list(listing.values())))}, {outer}"
    return join(f'{{"__metadata__": {{"fedlpp": {json.dumps(inner)}}}, {outer}}}', data)


def odd_shape(rng: random.Random, payload: bytes) -> bytes:
    """Also values that Python takes for equal: true, 1.0."""
    listing, header, data = take_apart(payload)
    entry = listing[rng.choice([name for name in listing if listing[name]["shape"]])]
    shape = entry["shape"]
    i = rng.randrange(len(shape))
    same = [float(shape[i]), *([True] if shape[i] == 1 else [])]
    others = [x for x in ODD if x is not shape[i]]
    entry["shape"] = rng.choice(
        [
            [*shape[:i], rng.choice(same), *shape[i + 1 :]],
            [*shape[:i], rng.choice(others), *shape[i + 1 :]],
            rng.choice(others),
            [*shape, 1],
            [*shape, 0],
            [math.prod(shape), 1, 1],
            [],
        ]
    )
    return written(listing, header, data)


def odd_entry(rng: random.Random, payload: bytes) -> bytes:
    listing, header, data = take_apart(payload)
    name, other = rng.sample(list(listing), 2)
    match rng.randrange(6):
        case 0:
            dtypes = ["F64", "I8", "BOOL", "F8_E4M3", "f32", *ODD]
            listing[name]["dtype"] = rng.choice(dtypes)
        case 1:
            ends = listing[name]["data_offsets"]
            wrong = [[0, 0], [ends[1], ends[0]], [ends[0], ends[1] + 1], [0, 2**64], *ODD]
            listing[name]["data_offsets"] = rng.choice(wrong)
        case 2:
            listing[name] = rng.choice(ODD)
        case 3:
            del listing[name][rng.choice(list(listing[name]))]
        case 4:
            listing[rng.choice(["", "x" * 2000, "\ud800", "a\nb", "__proto__"])] = listing.pop(name)
        case _:
            listing[other]["data_offsets"] = listing[name]["data_offsets"]
    return written(listing, header, data)


def odd_header(rng: random.Random, payload: bytes) -> bytes:
    """Sample counts, rounds, senders, formats."""
    listing, header, data = take_apart(payload)
    field = rng.choice(list(header))
    if rng.random() < 0.2:
        return written(listing, rng.choice(ODD), data)
    same = [float(header[field])] if isinstance(header[field], int) else []
    choices = [x for x in [*ODD, *same] if type(x) is not type(header[field]) or x != header[field]]
    header[field] = rng.choice(choices)
    return written(listing, header, data)


def odd_values(rng: random.Random, payload: bytes) -> bytes:
    """NaN, infinity, a huge norm; where there are scales, also negative ones."""
    _, header, _ = take_apart(payload)
    tensors = safetensors.torch.load(payload)
    floats = [n for n in tensors if tensors[n].is_floating_point() and tensors[n].numel()]
    name = rng.choice(floats)
    values = [math.nan, math.inf, -math.inf]
    values += [-1.0, -1e-3] if ":" in name else [1e4, -1e30, 3e38]
    values += [6e4] if name.endswith(":scales") else []
    flat = tensors[name].reshape(-1)
    flat[rng.randrange(len(flat))] = rng.choice(values)
    return safetensors.torch.save(tensors, {"fedlpp": json.dumps(header)})


def another_message(rng: random.Random, payload: bytes) -> bytes:
    """A safetensors file of other tensors under the right header."""
    _, header, _ = take_apart(payload)
    tensors = safetensors.torch.load(payload)
    name = rng.choice(list(tensors))
    wrong = [torch.zeros(0), torch.zeros(()), torch.zeros(3, 3, 3), tensors[name].double(),
             tensors[name].reshape(-1, 1), torch.zeros(2, dtype=torch.bool)]  # fmt: skip
    match rng.randrange(3):
        case 0:
            tensors[name] = rng.choice(wrong)
        case 1:
            del tensors[name]
        case _:
            tensors[rng.choice(["evil", name + ":codes", name + "\n"])] = tensors[name].clone()
    return safetensors.torch.save(tensors, {"fedlpp": json.dumps(header)})


ATTACKS: list[Callable[[random.Random, bytes], bytes]] = [
    truncated, extended, flipped_header, absurd_length, hostile_json, doubled_key, odd_shape,
    odd_entry, odd_header, odd_values, another_message,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_mutated_update_is_refused_and_changes_nothing(
    target: Target, attack: Callable[[random.Random, bytes], bytes]
) -> None:
    expected, before, good = target.finish(), target.held(), target.update(VICTIM)
    for seed in range(120):
        target.refuses(VICTIM, attack(random.Random(seed), good))
    assert target.held() == before
    assert target.finish() == expected
    target.server.receive(2, VICTIM, good)  # which was fine
    target.reopen()


def test_a_replay_or_an_impostor_is_refused(target: Target) -> None:
    expected, before = target.finish(), target.held()
    own, good = target.update(HONEST[0]), target.update(VICTIM)
    target.refuses(HONEST[0], own)
    target.refuses(VICTIM, own)
    target.refuses(VICTIM, target.update(VICTIM, started=1))
    target.refuses(VICTIM, target.update(VICTIM, started=3))
    target.refuses(VICTIM, target.server.encode_broadcast(2)[4])
    target.refuses(7, target.update(7))
    for client in (True, False, 2.0, "2", None, -1, 10**30, 10**5000, [2], "x\n" * 5000):
        target.refuses(client, good)
    for payload in (None, "", "x", 3, 2.5, [], {}, object(), bytearray(good), memoryview(good)):
        target.refuses(VICTIM, payload)
    assert target.held() == before
    assert target.finish() == expected


@pytest.mark.slow
def test_flipped_data_is_refused_or_a_legal_update(target: Target) -> None:
    """Any bits are some number. What is accepted is finite, and within the norm."""
    good, before = target.update(VICTIM), target.held()
    limit, start = target.server._experiment.server.max_update_norm, data_start(good)
    outcomes = set()
    for seed in range(200):
        rng, changed = random.Random(seed), bytearray(good)
        for place in rng.sample(range(start, len(good)), rng.choice([1, 4, 50])):
            changed[place] ^= 1 << rng.randrange(8)
        try:
            target.server.receive(2, VICTIM, bytes(changed))
        except MessageError:
            assert target.held() == before
            outcomes.add("refused")
            continue
        outcomes.add("accepted")
        mean = target.aggregator.total.direction()
        assert all(tensor.abs().max() < limit for tensor in mean.values())  # nor is it NaN
        target.reopen()
    assert "accepted" in outcomes


def test_a_hostile_partial_result_is_refused(target: Target) -> None:
    """A node's own claims it is believed, so bits of the header are not flipped here."""
    node = Aggregator(target.aggregator._opening)
    node.receive(VICTIM, target.update(VICTIM))
    expected, before, good = target.finish(), target.held(), node.partial()
    node.receive(HONEST[0], target.update(HONEST[0]))
    hostile: list[Any] = [None, "x", b"", node.partial()]  # the last has a client twice
    for attack in ATTACKS:
        if attack not in (flipped_header, odd_values, another_message, odd_header):
            hostile += [attack(random.Random(seed), good) for seed in range(60)]
    changes: list[tuple[str, Any]] = [("round", 1), ("format", True), ("cohort", ""), ("x", 1)]
    changes += [("clients", c) for c in ([], [1, 2], [2, 2], [7], [True], [2.0], "2", [[2]], DEEP)]
    changes += [("kinds", k) for k in ([], ["idle"], ["mean", "idle"], ["products"], "mean", [1])]
    listing, header, data = take_apart(good)
    hostile += [written(listing, header | {field: value}, data) for field, value in changes]
    tensors = safetensors.torch.load(good)
    metadata = {"fedlpp": json.dumps(header)}
    for name in ("mean/count", "mean/hi:weight", *tensors):
        for value in (-(2**63), 2**62, 2**63 - 1):
            wrong = torch.full_like(tensors[name], value)
            hostile.append(safetensors.torch.save(tensors | {name: wrong}, metadata))
    for payload in hostile:
        with pytest.raises(MessageError):
            target.server.merge(2, payload)
    assert target.held() == before
    assert target.finish() == expected
    assert target.server.merge(2, good) == [VICTIM]
    target.reopen()
