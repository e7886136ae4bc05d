"""The server's optimisers against FedOpt's algorithm 2 and FedAvgM, written again in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import torch

from fedlpp_ray.aggregation import OptimizerName, ServerOptimizer, make_optimizer, next_state
from fedlpp_ray.state import State, schema_of, state_digest

LR, MOMENTUM, BETA1, BETA2, TAU = 0.3, 0.8, 0.7, 0.95, 1e-2
SHAPES = {"x.lora_A.weight": (4, 33), "x.lora_B.weight": (17, 4), "classifier.bias": (6,)}
NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)
TOLERANCE = 1e-7
"""Relative. Both sides compute in float64; the project rounds once to fp32 (6e-8)."""


def reference(name: str, deltas: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Each round's step, as the papers print it."""
    m, v = np.zeros_like(deltas[0]), np.full_like(deltas[0], TAU**2)
    for delta in deltas:
        if name == "fedavg":
            yield LR * delta
        elif name == "fedavgm":
            m = MOMENTUM * m + delta
            yield LR * m
        else:
            beta1 = 0 if name == "fedadagrad" else BETA1
            m = beta1 * m + (1 - beta1) * delta
            if name == "fedadagrad":
                v = v + delta**2
            elif name == "fedyogi":
                v = v - (1 - BETA2) * delta**2 * np.sign(v - delta**2)
            else:
                v = BETA2 * v + (1 - BETA2) * delta**2
            yield LR * m / (np.sqrt(v) + TAU)


def stepped(optimizer: ServerOptimizer, anchor: State, direction: State) -> State:
    return {n: optimizer.step(n, anchor[n], d) for n, d in direction.items()}


def make(name: OptimizerName, shapes: dict[str, tuple[int, ...]] = SHAPES) -> ServerOptimizer:
    return make_optimizer(name, shapes, lr=LR, momentum=MOMENTUM, beta1=BETA1, beta2=BETA2, tau=TAU)


def draw(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
    random = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)
        for name, shape in SHAPES.items()
    }


def directions(count: int) -> list[State]:
    """Of scales around tau, so that tau, its square and the sign in Yogi all matter."""
    return [draw(seed, TAU * 3**seed / 9, torch.float64) for seed in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_five_steps_are_those_of_the_paper(name: OptimizerName) -> None:
    optimizer, given = make(name), directions(5)
    zero = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    found = [stepped(optimizer, zero, direction) for direction in given]
    for key in SHAPES:
        expected = reference(name, [direction[key].numpy() for direction in given])
        for step, paper in zip(found, expected, strict=True):
            np.testing.assert_allclose(step[key].numpy(), paper, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("lr", [1.0, 0.7, 1e-3])
@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
def test_fedavg_is_the_plain_rule_bit_for_bit(rule: str, lr: float) -> None:
    state, broadcast, mean = draw(0), draw(1), draw(2, 0.1, torch.float64)
    found = next_state(rule, state, broadcast, mean, make_optimizer("fedavg", SHAPES, lr=lr))
    for name, after in found.items():
        s, d, m = state[name].double(), broadcast[name].double(), mean[name]
        expected = {
            "residual": s + lr * m,
            "replace": d + lr * m,
            "pull": s + lr * (d + m - s),
        }
        assert torch.equal(after, expected[rule].float())


@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
def test_an_adaptive_optimiser_steps_from_the_anchor_of_the_rule(rule: str) -> None:
    state, broadcast, mean = draw(0), draw(1), draw(2, 0.1, torch.float64)
    found = next_state(rule, state, broadcast, mean, make("fedadam"))
    for name, after in found.items():
        s, d, m = (x[name].double().numpy() for x in (state, broadcast, mean))
        anchor = d if rule == "replace" else s
        (step,) = reference("fedadam", [d + m - s if rule == "pull" else m])
        np.testing.assert_allclose(after.numpy(), anchor + step, rtol=TOLERANCE, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimiser_goes_on_bit_for_bit(name: OptimizerName) -> None:
    steps = directions(6)
    whole, first = make(name), make(name)
    state = draw(0)
    for direction in steps[:3]:
        state, same = stepped(whole, state, direction), stepped(first, state, direction)
        assert state_digest(state) == state_digest(same)
    kept = first.state_dict()
    stepped(first, state, steps[5])  # what is kept is a copy
    kept = safetensors.torch.load(safetensors.torch.save(kept))
    second = make(name)
    second.load_state_dict(kept)
    for direction in steps[3:]:
        state, same = stepped(whole, state, direction), stepped(second, state, direction)
        assert state_digest(state) == state_digest(same)
    forgetful = stepped(make(name), state, steps[0])
    remembers = name != "fedavg"
    assert (state_digest(forgetful) != state_digest(stepped(whole, state, steps[0]))) == remembers
    assert bool(kept) == remembers


def test_the_state_of_another_optimiser_or_other_tensors_is_refused() -> None:
    kept = make("fedadam").state_dict()
    with pytest.raises(ValueError, match="not those of this experiment"):
        make("fedyogi").load_state_dict(kept)
    with pytest.raises(ValueError, match="not those of this experiment"):
        make("fedadam", SHAPES | {"classifier.bias": (7,)}).load_state_dict(kept)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_unchanged_and_results_are_fp32(name: OptimizerName) -> None:
    anchor, direction = draw(0), draw(1, dtype=torch.float64)
    before = state_digest(anchor), state_digest(direction)
    optimizer = make(name)
    first = stepped(optimizer, anchor, direction)
    kept = state_digest(first)
    stepped(optimizer, anchor, direction)
    assert (state_digest(anchor), state_digest(direction)) == before
    assert state_digest(first) == kept
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert schema_of(first) == schema_of(anchor)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_nobody_returned_stays_and_its_moments_do_not_age(
    name: OptimizerName,
) -> None:
    frozen = "x.lora_A.weight"
    state, (first, second) = draw(0), directions(2)
    optimizer = make(name)
    state = next_state("residual", state, state, first, optimizer)
    memory = {key: value for key, value in optimizer.state_dict().items() if frozen in key}
    part = {key: value for key, value in second.items() if key != frozen}
    after = next_state("residual", state, state, part, optimizer)
    assert [key for key in SHAPES if torch.equal(after[key], state[key])] == [frozen]
    kept = optimizer.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in memory.items())
    assert list(after) == list(state)


def test_there_is_no_optimiser_of_another_name() -> None:
    with pytest.raises(KeyError):
        make_optimizer("fedprox", SHAPES, lr=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_between_steps_only_the_memory_is_held(name: OptimizerName) -> None:
    optimizer = make(name)
    anchor = {n: torch.ones(shape) for n, shape in SHAPES.items()}
    for _ in range(2):
        for one in optimizer._optimizers.values():
            (parameter,) = one.param_groups[0]["params"]
            assert parameter.numel() == 0
            assert parameter.grad is None
        stepped(optimizer, anchor, {n: tensor.double() for n, tensor in anchor.items()})
