"""Encoding and checked decoding of one state.

A message is one safetensors file. Its metadata hold one key, `fedlpp`: the envelope (kind, round,
client, examples), the format version, the quantizer and a digest of the schema, as JSON. Each
tensor of the state travels as the parts of its quantized form (`NAME:codes`, `NAME:scales`, ...),
or whole, under its own name; flags, under theirs, as one bit each.

The receiver says what it expects and believes nothing of the message before it has checked it. No
pickle is involved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from fedlpp_ray.messages.checks import (
    MessageError,
    Parts,
    brief,
    check_finite,
    check_header,
    check_norm,
    check_tensors,
    read_header,
)
from fedlpp_ray.quantization import (
    UNGUARDED,
    Guard,
    QuantizedTensor,
    Quantizer,
    draw,
    pack,
    packed_bytes,
    unpack,
)
from fedlpp_ray.state import Schema, State, schema_digest, schema_of

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Envelope:
    """Who says what: a broadcast of a round, or a client's update with its number of examples."""

    kind: Literal["broadcast", "update"]
    round: int
    client: int | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Codec:
    """How the tensors of a state travel.

    Attributes:
        quantizer: For every tensor; None sends all whole.
        full_precision: Names of tensors that are sent whole all the same.
        dtype: Of what is sent whole: fp32 or bf16, rounded to nearest.
        flags: Names of tensors of zeros and ones.
        guard: How the sender chooses codes and scales; the receiver need not know it, unless it
            subtracts a dither.
    """

    quantizer: Quantizer | None
    full_precision: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32
    flags: frozenset[str] = frozenset()
    guard: Guard = UNGUARDED

    def of(self, name: str) -> Quantizer | None:
        """The quantizer of one tensor, or None where it is sent whole."""
        return None if name in self.full_precision else self.quantizer


def encode(
    envelope: Envelope,
    state: State,
    codec: Codec,
    generator: torch.Generator | None = None,
    before: Mapping[str, QuantizedTensor] | None = None,
) -> bytes:
    """The message that carries `state`.

    Args:
        envelope: Kind, round, sender.
        state: fp32 tensors; not changed.
        codec: How they travel.
        generator: Needed by stochastic rounding and dither only.
        before: What was sent last, by tensor, for a guard that remembers it. None: nothing was.

    Raises:
        MessageError: a tensor is not finite, or larger than its scales can be.
        ValueError: stochastic rounding lacks a generator.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in sorted(state.items()):
        check_finite(name, tensor)
        quantizer = codec.of(name)
        if name in codec.flags:
            parts[name] = pack(tensor.to(torch.uint8), levels=2)
        elif quantizer is None:
            parts[name] = tensor.to(codec.dtype).contiguous()
        else:
            last = (before or {}).get(name)
            for part, values in _quantized(name, tensor, codec, generator, last).tensors().items():
                parts[f"{name}:{part}"] = values
    return safetensors.torch.save(parts, {"fedlpp": _header(envelope, schema_of(state), codec)})


def _quantized(
    name: str,
    tensor: Tensor,
    codec: Codec,
    generator: torch.Generator | None,
    before: QuantizedTensor | None,
) -> QuantizedTensor:
    quantizer = codec.of(name)
    assert quantizer is not None
    if quantizer.rounding == "stochastic" and generator is None:
        return quantizer.quantize(tensor)  # says what it lacks
    try:
        return codec.guard.quantize(quantizer, tensor, before, generator)
    except ValueError as error:  # for instance a scale beyond fp16
        raise MessageError(f"{name}: {error}") from None


def decode(
    payload: bytes,
    expected: Envelope,
    schema: Schema,
    codec: Codec,
    *,
    max_norm: float = float("inf"),
    draws: State | None = None,
) -> State:
    """The state that a message carries: exactly what dequantizing at the sender would give.

    Args:
        payload: What was received; bytes, if it is a message.
        expected: The envelope that the receiver waits for.
        schema: Names and shapes that the receiver's model has.
        codec: How the receiver has agreed that they travel.
        max_norm: Largest L2 norm of the whole state, flags aside.
        draws: `dither` of the sender's seed, for a guard that is subtracted.

    Raises:
        MessageError: size, header, names, shapes, dtypes or values are not as expected, or the
            norm is too large. Nothing of the message has been used.
    """
    parts = _expected_parts(schema, codec)
    header = read_header(payload, parts)
    check_header(header, json.loads(_header(expected, schema, codec)))
    tensors = load(payload, parts)
    state = {
        name: _restore(name, schema[name], codec, tensors, (draws or {}).get(name))
        for name in schema
    }
    for name, tensor in state.items():
        check_finite(name, tensor)
    check_norm({n: t for n, t in state.items() if n not in codec.flags}, max_norm)
    return state


def quantized(payload: bytes, schema: Schema, codec: Codec) -> dict[str, QuantizedTensor]:
    """The codes and scales of a message that `decode` has accepted, by tensor.

    Args:
        payload: The message.
        schema: As `decode` was given it.
        codec: As `decode` was given it.
    """
    tensors = load(payload, _expected_parts(schema, codec))
    return {
        name: _stored(name, shape, quantizer, tensors)
        for name, shape in schema.items()
        if name not in codec.flags and (quantizer := codec.of(name))
    }


def dither(schema: Schema, codec: Codec, generator: torch.Generator) -> State:
    """What `encode` draws from a generator of the same seed where it dithers, by tensor, (n,)."""
    return {
        name: draw(math.prod(shape), generator)
        for name, shape in sorted(schema.items())
        if name not in codec.flags and codec.of(name)
    }


def load(payload: bytes, parts: Parts) -> State:
    """The tensors of a message whose header has been checked.

    Raises:
        MessageError: it is no safetensors file, or has other tensors.
    """
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:
        raise MessageError(f"not a safetensors message: {brief(str(error))}") from None
    check_tensors(tensors, parts)
    return tensors


def _header(envelope: Envelope, schema: Schema, codec: Codec) -> str:
    header = {
        "format": FORMAT_VERSION,
        **asdict(envelope),
        "quantizer": None if codec.quantizer is None else asdict(codec.quantizer),
        "full_precision": sorted(codec.full_precision),
        "schema": schema_digest(schema),
    }
    return json.dumps(header)


def _expected_parts(schema: Schema, codec: Codec) -> Parts:
    parts: Parts = {}
    for name, shape in schema.items():
        quantizer = codec.of(name)
        if name in codec.flags:
            parts[name] = (torch.uint8, (packed_bytes(shape[0], levels=2),))
        elif quantizer is None:
            parts[name] = (codec.dtype, shape)
        else:
            for part, expected in quantizer.parts(shape).items():
                parts[f"{name}:{part}"] = expected
    return parts


def _restore(
    name: str,
    shape: tuple[int, ...],
    codec: Codec,
    tensors: Mapping[str, Any],
    draws: Tensor | None,
) -> Tensor:
    if name in codec.flags:
        return unpack(tensors[name], levels=2, numel=shape[0]).float()
    quantizer = codec.of(name)
    if quantizer is None:
        return tensors[name].float()  # type: ignore[no-any-return]
    return codec.guard.dequantize(_stored(name, shape, quantizer, tensors), draws)


def _stored(
    name: str, shape: tuple[int, ...], quantizer: Quantizer, tensors: Mapping[str, Any]
) -> QuantizedTensor:
    parts = {part: tensors[f"{name}:{part}"] for part in quantizer.parts(shape)}
    try:
        return QuantizedTensor.from_parts(quantizer, shape, torch.float32, parts)
    except ValueError as error:
        raise MessageError(f"{name}: {error}") from None
