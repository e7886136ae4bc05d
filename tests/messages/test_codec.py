"""Messages: what arrives is exactly what was quantized, and nothing else gets in."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlpp_ray.messages import Codec, Envelope, MessageError, Transfer, decode, encode, total_bytes
from fedlpp_ray.quantization import Quantizer

BROADCAST = Envelope("broadcast", 3)
UPDATE = Envelope("update", 3, client=5, examples=40)

quantizers = st.builds(
    Quantizer,
    bits=st.sampled_from(["ternary", 2, 3, 4, 5, 6, 7, 8]),
    kind=st.sampled_from(["nf", "nf-symmetric", "lloyd-max", "int"]),
    block=st.sampled_from([8, 32, 64, 100]),
    scale=st.sampled_from(["fp32", "fp16", "double"]),
)
shapes = st.lists(
    st.lists(st.integers(0, 12), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4
)


def make_state(shapes: list[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def schema_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@settings(max_examples=60, deadline=None)
@given(quantizer=quantizers, shapes=shapes, seed=st.integers(0, 1000))
def test_decoding_gives_exactly_the_quantized_state(
    quantizer: Quantizer, shapes: list[tuple[int, ...]], seed: int
) -> None:
    state = make_state(shapes, seed)
    received = decode(
        encode(BROADCAST, state, Codec(quantizer)), BROADCAST, schema_of(state), Codec(quantizer)
    )
    assert received.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(received[name], quantizer.quantize(tensor).dequantize())


@settings(max_examples=30, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 1000))
def test_full_precision_is_bit_for_bit(shapes: list[tuple[int, ...]], seed: int) -> None:
    state = make_state(shapes, seed)
    received = decode(encode(UPDATE, state, Codec(None)), UPDATE, schema_of(state), Codec(None))
    assert all(torch.equal(received[name], tensor) for name, tensor in state.items())


def test_an_exempt_tensor_travels_whole_and_the_others_do_not() -> None:
    state = make_state([(64, 4), (6, 64)], 0)
    codec = Codec(Quantizer(2), frozenset({"t1"}))
    received = decode(encode(BROADCAST, state, codec), BROADCAST, schema_of(state), codec)
    assert torch.equal(received["t1"], state["t1"])
    assert received["t0"].unique().numel() <= 4 * 4


def test_stochastic_rounding_is_reproduced_by_its_generator() -> None:
    state = make_state([(64, 8)], 0)
    codec = Codec(Quantizer(2, rounding="stochastic"))
    one, same, other = (
        encode(BROADCAST, state, codec, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_the_same_state_always_gives_the_same_bytes() -> None:
    state = make_state([(64, 8), (3, 5)], 0)
    reordered = dict(reversed(state.items()))
    codec = Codec(Quantizer(4))
    assert encode(BROADCAST, state, codec) == encode(BROADCAST, reordered, codec)


def test_encoding_leaves_the_state_alone_and_refuses_what_is_not_finite() -> None:
    state = make_state([(64, 8)], 0)
    before = {name: tensor.clone() for name, tensor in state.items()}
    encode(BROADCAST, state, Codec(Quantizer("ternary")))
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    for value in (math.nan, math.inf, -math.inf):
        state["t0"][0, 0] = value
        for codec in (Codec(None), Codec(Quantizer(4))):
            with pytest.raises(ValueError, match="t0: holds NaN or infinity"):
                encode(BROADCAST, state, codec)


def test_tensor_bytes_are_those_counted_by_hand() -> None:
    """3 bits and 64-blocks with fp32 scales: 3/8 + 4/64 bytes a parameter, and the header."""
    state = make_state([(384, 8)], 0)
    payload = encode(BROADCAST, state, Codec(Quantizer(3, block=64)))
    (header_size,) = struct.unpack("<Q", payload[:8])
    assert len(payload) - 8 - header_size == 384 * 8 * 3 // 8 + 384 * 8 // 64 * 4


def test_the_ledger_adds_up() -> None:
    ledger = [Transfer(client=0, down=10, up=3), Transfer(client=4, down=10, up=4)]
    assert total_bytes(ledger) == {"down": 20, "up": 7}


# What a receiver refuses.

STATE = make_state([(64, 4), (6,)], 0)
CODEC = Codec(Quantizer(4))


def tampered(change: Callable[[dict[str, Tensor], dict[str, object]], None]) -> bytes:
    """A well-formed safetensors message, changed before it was written."""
    payload = encode(BROADCAST, STATE, CODEC)
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["fedlpp"])
    tensors = safetensors.torch.load(payload)
    change(tensors, header)
    return safetensors.torch.save(tensors, {"fedlpp": json.dumps(header)})


def change_header(**fields: object) -> bytes:
    return tampered(lambda _tensors, header: header.update(fields))


def change_tensor(name: str, value: Tensor | None) -> bytes:
    def change(tensors: dict[str, Tensor], _header: object) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return tampered(change)


GOOD = encode(BROADCAST, STATE, CODEC)
HOSTILE = {
    "empty": (b"", "too few"),
    "truncated": (GOOD[:-1], "not a safetensors message"),
    "trailing bytes": (GOOD + b"x", "not a safetensors message"),
    "huge": (GOOD + b"x" * 100_000, "bytes; at most"),
    "header longer than the message": (b"\xff" * 8 + GOOD[8:], "a header of"),
    "header not JSON": (GOOD[:8] + b"{" * 40 + GOOD[48:], "no readable header"),
    "no metadata": (safetensors.torch.save({"t0": torch.ones(1)}), "no readable header"),
    "another format": (change_header(format=2), "format is 2, expected 1"),
    "an update for a broadcast": (change_header(kind="update"), "kind is 'update'"),
    "another round": (change_header(round=2), "round is 2, expected 3"),
    "a boolean for a number": (change_header(round=True), "round is True"),
    "another quantizer": (change_header(quantizer=None), "quantizer is None"),
    "another schema": (change_header(schema="0"), "schema is '0'"),
    "a field too many": (change_header(extra=1), "the header's fields"),
    "a missing tensor": (
        change_tensor("t1:codes", None),
        "missing or unexpected tensors: t1:codes",
    ),
    "a tensor too many": (change_tensor("evil", torch.ones(1)), "unexpected tensors: 'evil'"),
    "another dtype": (change_tensor("t0:scales", torch.ones(4).half()), "t0:scales: dtype"),
    "another shape": (change_tensor("t0:scales", torch.ones(3)), "t0:scales: dtype and shape"),
    "a scale that is not finite": (change_tensor("t0:scales", torch.full((4,), math.inf)), "t0"),
    "a negative scale": (change_tensor("t0:scales", -torch.ones(4)), "t0"),
}


def test_a_header_longer_than_any_that_is_expected_is_not_read() -> None:
    """Also where the whole message is no longer than one may be."""
    most = int(re.findall(r"at most (\d+)", refusal(b"x" * 10**6))[0])
    words = refusal((most - 8).to_bytes(8, "little") + b" " * (most - 8))
    assert re.match(rf"a header of {most - 8} bytes; at most \d+ are expected", words)


def refusal(payload: bytes) -> str:
    with pytest.raises(MessageError) as error:
        decode(payload, BROADCAST, schema_of(STATE), CODEC)
    return str(error.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_message_is_refused(case: str) -> None:
    payload, words = HOSTILE[case]
    with pytest.raises(MessageError, match=words):
        decode(payload, BROADCAST, schema_of(STATE), CODEC)


def test_the_untampered_message_is_accepted() -> None:
    decode(tampered(lambda *_: None), BROADCAST, schema_of(STATE), CODEC)


def test_codes_outside_the_alphabet_are_refused() -> None:
    codec = Codec(Quantizer("ternary"))
    payload = bytearray(encode(BROADCAST, STATE, codec))
    tensors = safetensors.torch.load(bytes(payload))
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])["__metadata__"]
    tensors["t0:codes"][0] = 255  # no five digits of base 3 make this byte
    with pytest.raises(MessageError, match=r"t0.*levels"):
        decode(safetensors.torch.save(tensors, header), BROADCAST, schema_of(STATE), codec)


@pytest.mark.parametrize("field", [{"round": 4}, {"client": 6}, {"examples": 10**9}], ids=str)
def test_an_update_must_be_the_expected_clients(field: dict[str, int]) -> None:
    payload = encode(replace(UPDATE, **field), STATE, Codec(None))
    with pytest.raises(MessageError, match=next(iter(field))):
        decode(payload, UPDATE, schema_of(STATE), Codec(None))


def test_nan_and_too_large_a_norm_are_refused() -> None:
    payload = encode(UPDATE, STATE, Codec(None))
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in STATE.values()))
    decode(payload, UPDATE, schema_of(STATE), Codec(None), max_norm=norm * 1.001)
    with pytest.raises(MessageError, match="norm is"):
        decode(payload, UPDATE, schema_of(STATE), Codec(None), max_norm=norm * 0.999)
    tensors = safetensors.torch.load(payload)
    tensors["t0"][0, 0] = math.nan
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])["__metadata__"]
    with pytest.raises(MessageError, match="t0: holds NaN"):
        decode(safetensors.torch.save(tensors, header), UPDATE, schema_of(STATE), Codec(None))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_decodes_to_finite_numbers(position: int, value: int) -> None:
    payload = bytearray(GOOD)
    payload[position] = value
    try:
        state = decode(bytes(payload), BROADCAST, schema_of(STATE), CODEC)
    except MessageError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_scale_beyond_its_format_is_a_fault_of_the_message() -> None:
    codec = Codec(Quantizer(4, "nf", 64, "fp16"))
    with pytest.raises(MessageError, match="x: block scale 100000 exceeds"):
        encode(Envelope("update", 1, 0, 8), {"x": torch.full((64,), 1e5)}, codec)
