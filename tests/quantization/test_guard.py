"""What a sender does beyond rounding, against scalar references, and what follows from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlpp_ray.quantization import (
    Bits,
    Guard,
    Kind,
    QuantizedTensor,
    Quantizer,
    Scale,
    codebook,
    draw,
)

BOOKS: list[tuple[Bits, Kind]] = [
    ("ternary", "nf"),
    (2, "nf"),
    (2, "nf-symmetric"),
    (3, "lloyd-max"),
    (3, "int"),
]
BLOCK = 16


def walk(rounds: int = 8, step: float = 0.15, seed: int = 0) -> list[Tensor]:
    """A tensor that moves: (3, 27) has a short last block; its first block is zero at first."""
    random = torch.Generator().manual_seed(seed)
    weights, found = torch.randn(3, 27, generator=random), []
    for number in range(rounds):
        found.append(weights.clone())
        found[-1].view(-1)[:BLOCK] *= number > 0
        weights = weights + step * torch.randn(3, 27, generator=random)
    return found


def send(guard: Guard, quantizer: Quantizer, secrets: list[Tensor]) -> list[QuantizedTensor]:
    """One message after the other, with the draws of a run."""
    sent: list[QuantizedTensor] = []
    for secret in secrets:
        random, last = torch.Generator().manual_seed(7), sent[-1] if sent else None
        sent.append(guard.quantize(quantizer, secret, last, random))
    return sent


def kept(s: float, before: int, levels: list[float], margin: float) -> bool:
    """Whether a code stays, from its definition: midpoints, and halves of a gap beyond them."""
    above, below = math.inf, -math.inf
    if before + 1 < len(levels):
        gap = levels[before + 1] - levels[before]
        above = (levels[before] + levels[before + 1]) / 2 + margin * gap / 2
    if before > 0:
        gap = levels[before] - levels[before - 1]
        below = (levels[before] + levels[before - 1]) / 2 - margin * gap / 2
    return below <= s <= above


@pytest.mark.parametrize(("bits", "kind"), BOOKS)
@pytest.mark.parametrize("margin", [0.3, 1.0])
def test_a_code_changes_only_beyond_the_margin(bits: Bits, kind: Kind, margin: float) -> None:
    quantizer = Quantizer(bits, kind, BLOCK)
    levels = codebook(bits, kind, BLOCK).tolist()
    secrets = walk()
    sent = send(Guard(hysteresis=margin), quantizer, secrets)
    stayed = 0
    for secret, now, last in zip(secrets[1:], sent[1:], sent, strict=False):
        fresh = quantizer.quantize(secret).codes().tolist()
        for number, weight in enumerate(secret.flatten().tolist()):
            c, before = float(now.scales()[number // BLOCK]), int(last.codes()[number])
            stays = float(last.scales()[number // BLOCK]) > 0 and kept(
                weight / c, before, levels, margin
            )
            assert int(now.codes()[number]) == (before if stays else fresh[number])
            stayed += stays and before != fresh[number]
    assert stayed > 20


def test_scales_are_held_within_a_factor_of_root_two() -> None:
    """And a constant is the same message again."""
    quantizer, guard = Quantizer(2, "nf", BLOCK), Guard(hold_scales=True)
    start = torch.linspace(-1, 1, BLOCK)
    for factor, held in (
        (0.99, True),
        (0.708, True),
        (0.707, False),
        (1.414, True),
        (1.415, False),
    ):
        first, second = send(guard, quantizer, [start, start * factor])
        assert float(second.scales()) == pytest.approx(1.0 if held else factor)
    assert torch.equal(first.scales(), torch.ones(1))
    zero = guard.quantize(quantizer, torch.zeros(BLOCK), first)
    assert float(zero.scales()) == 0
    assert float(guard.quantize(quantizer, start, zero).scales()) == 1
    once, again = send(guard, quantizer, [start] * 2)
    assert torch.equal(once.dequantize(), again.dequantize())


@pytest.mark.parametrize(("bits", "kind"), BOOKS)
def test_a_dither_is_unbiased_whatever_the_levels_and_at_a_half_it_is_the_nearest(
    bits: Bits, kind: Kind
) -> None:
    """Over 4000 draws; the standard error of a mean is at most gap / 2 / sqrt(4000)."""
    quantizer, secret = Quantizer(bits, kind, 64), torch.linspace(-1, 1, 64)
    random = torch.Generator().manual_seed(0)
    sent = Guard(dithered=True).quantize(quantizer, secret.repeat(4000, 1), None, random)
    mean = sent.dequantize().mean(0)
    levels = codebook(bits, kind, 64)
    inside = (levels[0] <= secret) & (secret <= levels[-1])
    bound = 5 * float(levels.diff().max()) / 2 / math.sqrt(4000)
    assert ((mean - secret)[inside].abs() <= bound).all()
    drawn = Quantizer(bits, kind, 64, "fp32", "stochastic")
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    dithered = Guard(dithered=True).quantize(quantizer, secret, None, one)
    assert torch.equal(dithered.codes(), drawn.quantize(secret, other).codes())
    still = quantizer.levels().sticky(secret, None, quantizer.quantize(secret).codes(), 0.0)
    assert torch.equal(still.int(), quantizer.quantize(secret).codes().int())


@pytest.mark.parametrize("scale", ["fp32", "fp16", "double"])
def test_the_norm_of_every_block_is_kept(scale: Scale) -> None:
    quantizer, (secret, *_) = Quantizer(2, "nf", BLOCK, scale), walk(1)
    (sent,) = send(Guard(magnitude="norm"), quantizer, [secret])
    plain = quantizer.quantize(secret)
    assert sent.nbytes == plain.nbytes
    for number, block in enumerate(secret.flatten().split(BLOCK)):
        found = sent.dequantize().flatten()[number * BLOCK :][:BLOCK]
        rough = 1e-6 if scale == "fp32" else 4e-3
        assert float(found.norm()) == pytest.approx(float(block.norm()), rel=rough)
    if scale == "fp32":
        assert torch.equal(sent.codes(), plain.codes())


GUARDS = [
    Guard(),
    Guard(hysteresis=0.5),
    Guard(hysteresis=2.5),
    Guard(hold_scales=True),
    Guard(hysteresis=1.0, hold_scales=True),
    Guard(dithered=True),
    Guard(hysteresis=0.7, dithered=True, hold_scales=True),
    Guard(magnitude="norm"),
    Guard(hysteresis=0.7, magnitude="norm"),
]


@pytest.mark.parametrize(("bits", "kind"), BOOKS)
@pytest.mark.parametrize(
    ("guard", "scale"),
    [
        (g, s)
        for g in GUARDS
        for s in ("fp32", "fp16", "double")
        if not g.hold_scales or s[0] == "f"
    ],
    ids=str,
)
def test_the_secret_is_inside_the_cells_of_one_who_knows_the_guard(
    guard: Guard, scale: Scale, bits: Bits, kind: Kind
) -> None:
    """Without any tolerance: with the message before, and, wider, without it."""
    quantizer, secrets = Quantizer(bits, kind, BLOCK, scale), walk()
    sent = send(guard, quantizer, secrets)
    for number, (secret, message) in enumerate(zip(secrets, sent, strict=True)):
        before = sent[number - 1] if number else None
        low, high = guard.cells(message, before, first=not number)
        assert ((low <= secret) & (secret <= high)).all()
        wide_low, wide_high = guard.cells(message)
        assert ((wide_low <= low) & (high <= wide_high)).all()


@pytest.mark.parametrize("guard", GUARDS[1:], ids=repr)
def test_the_cells_of_one_who_does_not_know_it_would_be_wrong(guard: Guard) -> None:
    quantizer, secrets = Quantizer(2, "nf", BLOCK), walk()
    wrong = 0
    for secret, message in zip(secrets, send(guard, quantizer, secrets), strict=True):
        low, high = message.cells()
        wrong += int(((secret < low - 1e-3) | (secret > high + 1e-3)).sum())
    assert wrong > 10


def test_a_code_that_has_just_changed_says_where_the_value_crossed() -> None:
    """Uniform levels -1, 0, 1; a margin of 1/2: 0 is left for 1 beyond 3/4, and 1 for 0 below 1/4.

    A rising value is known to be in [3/4, 1] when its code changes, and in [1/4, 1] afterwards.
    """
    quantizer, guard = Quantizer("ternary", "nf", 8), Guard(hysteresis=0.5)
    secrets = [torch.tensor([1.0, value, 0, 0, 0, 0, 0, 0]) for value in (0.4, 0.7, 0.8, 0.6)]
    sent = send(guard, quantizer, secrets)
    assert [float(message.dequantize()[1]) for message in sent] == [0, 0, 1, 1]
    cells = [guard.cells(sent[0], first=True)]
    cells += [guard.cells(now, last) for now, last in zip(sent[1:], sent, strict=False)]
    found = [(float(low[1]), float(high[1])) for low, high in cells]
    expected = [(-0.5, 0.5), (-0.75, 0.75), (0.75, 1.0), (0.25, 1.0)]
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), abs=1e-5)


SUBTRACTED = Guard(dithered=True, subtracted=True)


def subtracted(quantizer: Quantizer, secret: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What one who has the seed reads, and the steps of c, of the secret's shape."""
    sent = SUBTRACTED.quantize(quantizer, secret, None, torch.Generator().manual_seed(seed))
    draws = draw(secret.numel(), torch.Generator().manual_seed(seed))
    low, high = SUBTRACTED.cells(sent, draws=draws)
    assert ((low <= secret) & (secret <= high)).all()
    steps = sent.scales().repeat_interleave(quantizer.block)[: secret.numel()]
    steps = steps.view_as(secret) * 2 / (len(codebook(quantizer.bits, quantizer.kind)) - 1)
    assert (high - low <= steps * 1.02).all()  # a scale that is rounded widens them
    return SUBTRACTED.dequantize(sent, draws), steps


@pytest.mark.parametrize("bits", ["ternary", 2, 3, 5])
def test_a_subtracted_dither_against_its_definition(bits: Bits) -> None:
    """D = Q(S + u) - u in float64, Q to the nearest multiple of a step; to float32's rounding.

    With the draws of more than one run of weights, and a short last block.
    """
    quantizer = Quantizer(bits, "int", 64)
    secret = torch.randn(150_001, generator=torch.Generator().manual_seed(1))
    found, steps = subtracted(quantizer, secret)
    step, s = steps.double().numpy(), secret.double().numpy()
    u = (0.5 - torch.rand(len(secret), generator=torch.Generator().manual_seed(0)).numpy()) * step
    expected = np.rint((s + u) / step) * step - u
    # At a boundary float32 may go the other way: there both are half a step away.
    off = np.abs(found.numpy() - expected) > 1e-5 * step
    assert off.sum() <= 2
    assert np.abs(found.numpy() - s).max() <= (0.5 + 1e-5) * step.max()


def test_its_codes_are_those_of_the_dither_that_is_not_subtracted() -> None:
    """So who lacks the seed reads that."""
    quantizer, (secret, *_) = Quantizer(3, "int", BLOCK), walk(1)
    sent, plain = (
        guard.quantize(quantizer, secret, None, torch.Generator().manual_seed(2))
        for guard in (SUBTRACTED, Guard(dithered=True))
    )
    assert torch.equal(sent.codes(), plain.codes())
    assert sent.nbytes == plain.nbytes


def test_its_error_is_uniform_over_a_step_and_independent_of_the_weight() -> None:
    """Of 200,000 values, within 4 standard errors: mean 0, variance step^2 / 12, and in each tenth
    of the values that a weight can have, the outermost too, both again."""
    secret = 2 * torch.rand(200_000, generator=torch.Generator().manual_seed(3)) - 1
    found, steps = subtracted(Quantizer(2, "int", 64), secret)
    errors = ((found - secret) / steps).double()
    tenths = ((secret + 1) * 5).long().clamp(0, 9)
    for part in (torch.ones_like(secret).bool(), *(tenths == tenth for tenth in range(10))):
        count = int(part.sum())
        assert abs(float(errors[part].mean())) < 4 / math.sqrt(12 * count)
        # Of a uniform error's square the standard deviation is 1 / sqrt(180).
        assert abs(float((errors[part] ** 2).mean()) - 1 / 12) < 4 / math.sqrt(180 * count)
    shares = torch.histc(errors, 20, -0.5, 0.5) / len(errors)
    assert float((shares - 0.05).abs().max()) < 4 * math.sqrt(0.05 * 0.95 / len(errors))


@pytest.mark.parametrize("scale", ["fp32", "fp16", "double"])
def test_cells_hold_whatever_the_storage_of_scales(scale: Scale) -> None:
    """In every message of a walk whose first block starts at zero, and stays it."""
    quantizer = Quantizer(2, "int", BLOCK, scale)
    for number, secret in enumerate(walk()):
        found, _ = subtracted(quantizer, secret, number)
        assert number or not found.view(-1)[:BLOCK].any()


def test_draws_need_a_generator() -> None:
    with pytest.raises(ValueError, match=r"dither need a torch\.Generator"):
        Guard(dithered=True).quantize(Quantizer(2), torch.ones(8))
