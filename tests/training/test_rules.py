"""Client rules and schedules: against autograd, hand values, transformers, and a known optimum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedlpp_ray.aggregation import weighted_mean
from fedlpp_ray.config import ClientConfig
from fedlpp_ray.lora import read_state, write_state
from fedlpp_ray.state import State
from fedlpp_ray.training import (
    ClientRule,
    Descent,
    FedProx,
    Scaffold,
    Schedule,
    Training,
    next_server_variate,
    schedule_factor,
)
from fedlpp_ray.training.rules import PLAIN

SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")
SGD = Descent("sgd")


class Quadratic(nn.Module):
    """Gives sum_j curvature_j / 2 (w_j - optimum_j)^2, whatever the text, and `train` takes it as
    the loss; `seen` are the w of steps."""

    def __init__(self, curvature: Sequence[float], optimum: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(optimum)))
        self.curvature, self.optimum = torch.tensor(curvature), torch.tensor(optimum)
        self.seen: list[Tensor] = []

    def forward(self, **_: Tensor) -> SimpleNamespace:
        self.seen.append(self.w.detach().clone())
        return SimpleNamespace(logits=(self.curvature / 2 * (self.w - self.optimum) ** 2).sum())


def train(
    model: nn.Module,
    *,
    lr: float,
    steps: int,
    descent: Descent = PLAIN,
    rules: Sequence[ClientRule] = (),
    weight_decay: float = 0.0,
) -> None:
    training = Training(
        model,
        [(torch.tensor([1]), 0)],
        ClientConfig(lr=lr, weight_decay=weight_decay),
        steps=steps,
        seed=0,
        pad=0,
        device=torch.device("cpu"),
        descent=descent,
        rules=rules,
    )
    with patch("fedlpp_ray.training.local.smoothed_loss", lambda found, *_: found):
        training.run()


class Table(nn.Module):
    """Logits of three classes that no text changes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -1.0, 2.0]))

    def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
        return SimpleNamespace(logits=self.w.expand(len(input_ids), 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_step_is_along_the_smoothed_loss(smoothing: float) -> None:
    """The target has 1 - s of the probability, and all classes share s. The tolerance is fp32's."""
    model = Table()
    start = model.w.detach().double()
    target = torch.full((3,), smoothing / 3).double()
    target[1] += 1 - smoothing
    loss = Training(
        model,
        [(torch.tensor([1]), 1)],
        ClientConfig(lr=0.5, weight_decay=0.0, label_smoothing=smoothing),
        steps=1,
        seed=0,
        pad=0,
        device=torch.device("cpu"),
        descent=SGD,
    ).run()
    assert loss == pytest.approx(-(target * start.log_softmax(0)).sum().item(), abs=1e-6)
    expected = start - 0.5 * (start.softmax(0) - target)
    torch.testing.assert_close(model.w.detach().double(), expected, atol=1e-6, rtol=0)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0, 0.5, 1, 0.5]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 1, [0, 1, 0.75, 0.25]),
    ],
)
def test_schedules_by_hand(schedule: Schedule, warmup: int, expected: list[float]) -> None:
    found = [schedule_factor(schedule, step, 4, warmup) for step in range(4)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(schedule: Schedule, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, warmup, 17)
    for step in range(17):
        assert schedule_factor(schedule, step, 17, warmup) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        theirs.step()


def test_over_rounds_the_first_is_whole_and_the_last_is_not_nothing() -> None:
    for schedule in SCHEDULES:
        factors = [schedule_factor(schedule, round - 1, 5) for round in range(1, 6)]
        assert factors[0] == 1
        assert factors == sorted(factors, reverse=True)
        assert factors[-1] > 0


@pytest.mark.parametrize(
    ("share", "steps", "warmup"),
    [(0, 10, 0), (0.06, 10, 1), (0.5, 3, 2), (0.99, 10, 9), (0.5, 1, 0)],
)
def test_warm_up_is_rounded_up_but_leaves_a_step(share: float, steps: int, warmup: int) -> None:
    descent = Descent(warmup=share)
    found = [descent.factor(step, steps) for step in range(steps)]
    assert found == [schedule_factor("constant", step, steps, warmup) for step in range(steps)]
    assert found[-1] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_steps_by_the_schedule_anew_each_round(schedule: Schedule) -> None:
    """On w - 1 under SGD, w_k+1 - 1 = (1 - lr_k) (w_k - 1)."""
    descent = Descent("sgd", schedule=schedule, warmup=0.3, scale=0.5)
    for _ in range(2):
        model = Quadratic([1.0], [1.0])
        train(model, lr=0.4, steps=5, descent=descent)
        gaps = [1 - w.item() for w in [*model.seen, model.w.detach()]]
        found = [1 - after / before for before, after in itertools.pairwise(gaps)]
        expected = [0.4 * 0.5 * schedule_factor(schedule, step, 5, 2) for step in range(5)]
        assert found == pytest.approx(expected, abs=1e-6)
        assert descent.travelled(0.4, 5) == pytest.approx(sum(expected), rel=1e-12)


def test_the_default_is_adamw_at_a_constant_rate() -> None:
    model, twin = (Quadratic([1.0, 3.0], [1.0, -2.0]) for _ in range(2))
    train(model, lr=0.1, steps=4, weight_decay=0.5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        twin().logits.backward()
        optimizer.step()
    assert torch.equal(model.w, twin.w)


def test_sgd_has_momentum_and_weight_decay() -> None:
    model = Quadratic([1.0], [1.0])
    train(model, lr=0.1, steps=2, descent=Descent("sgd", momentum=0.5), weight_decay=0.2)
    first = 0.1 * 1.0  # the gradient at 0 is -1
    momentum = 0.5 * -1.0 + (first - 1.0 + 0.2 * first)
    assert model.w.item() == pytest.approx(first - 0.1 * momentum, rel=1e-6)


# FedProx


def test_the_gradient_of_fedprox_is_that_of_the_penalised_loss() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    parameters = dict(model.named_parameters())
    received = {name: w.detach().clone() for name, w in parameters.items()}
    rule = FedProx(mu=0.7)
    rule.start(parameters)
    with torch.no_grad():
        for w in parameters.values():
            w.add_(torch.randn_like(w))
    inputs = torch.randn(4, 5)
    model(inputs).square().sum().backward()
    rule.adjust(parameters)
    penalty = sum(((w - received[name]) ** 2).sum() for name, w in parameters.items())
    loss = model(inputs).square().sum() + 0.7 / 2 * penalty
    expected = torch.autograd.grad(loss, list(parameters.values()))
    for w, gradient in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(w.grad, gradient, rtol=1e-6, atol=1e-5)


def test_fedprox_ends_between_what_it_received_and_its_optimum() -> None:
    """The minimum of 1/2 (w - 1)^2 + mu/2 (w - D)^2 is (1 + mu D) / (1 + mu)."""
    model = Quadratic([1.0], [1.0])
    write_state(model, {"w": torch.tensor([-2.0])})
    train(model, lr=0.1, steps=300, descent=SGD, rules=[FedProx(3.0)])
    assert model.w.item() == pytest.approx((1 + 3 * -2) / (1 + 3), abs=1e-5)


# SCAFFOLD: two clients of different curvatures and optima

CURVATURES, OPTIMA = ([1.0, 4.0], [6.0, 0.5]), ([1.0, -1.0], [-2.0, 3.0])
ZERO = {"w": torch.zeros(2)}


def joint(shares: Sequence[float]) -> list[float]:
    """argmin of sum_i p_i f_i."""
    return [
        sum(p * a[j] * b[j] for p, a, b in zip(shares, CURVATURES, OPTIMA, strict=True))
        / sum(p * a[j] for p, a in zip(shares, CURVATURES, strict=True))
        for j in range(2)
    ]


class Toy:
    """Rounds at a server learning rate of 1, without quantization; clients weigh `shares`."""

    def __init__(self, shares: Sequence[float], descent: Descent = SGD, steps: int = 20) -> None:
        self.shares, self.descent, self.steps, self.lr = shares, descent, steps, 0.1
        self.models = [Quadratic(a, b) for a, b in zip(CURVATURES, OPTIMA, strict=True)]
        self.state, self.c, self.c_i = ZERO, ZERO, [ZERO, ZERO]

    def round(self, cohort: Sequence[int], scaffold: bool, received: State | None = None) -> None:
        received = self.c if received is None else received
        share = sum(self.shares[i] for i in cohort)
        updates = []
        for i in cohort:
            rule = Scaffold(received, self.c_i[i])
            write_state(self.models[i], self.state)
            rules = [rule] if scaffold else []
            model, descent = self.models[i], self.descent
            train(model, lr=self.lr, steps=self.steps, descent=descent, rules=rules)
            after = read_state(self.models[i])
            updates.append({name: after[name] - self.state[name] for name in after})
            self.c_i[i] = rule.variate
        mean = weighted_mean(updates, [self.shares[i] / share for i in cohort])
        if scaffold:
            travelled = self.descent.travelled(self.lr, self.steps)
            self.c = next_server_variate(self.c, received, mean, share=share, travelled=travelled)
        self.state = {name: (self.state[name] + mean[name]).float() for name in mean}


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.2)])
def test_scaffold_finds_the_joint_optimum_that_fedavg_misses(shares: tuple[float, float]) -> None:
    scaffold, fedavg = Toy(shares), Toy(shares)
    for _ in range(60):
        scaffold.round([0, 1], scaffold=True)
        fedavg.round([0, 1], scaffold=False)
    assert scaffold.state["w"].tolist() == pytest.approx(joint(shares), abs=1e-4)
    gaps = [abs(x - y) for x, y in zip(fedavg.state["w"].tolist(), joint(shares), strict=True)]
    assert min(gaps) > 0.1


def test_scaffold_finds_it_under_a_schedule_too() -> None:
    toy = Toy((0.5, 0.5), Descent("sgd", schedule="cosine", warmup=0.1, scale=0.5))
    for _ in range(120):
        toy.round([0, 1], scaffold=True)
    assert toy.state["w"].tolist() == pytest.approx(joint((0.5, 0.5)), abs=1e-4)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.2)])
def test_the_servers_variate_is_the_mean_of_all_clients(shares: tuple[float, float]) -> None:
    """Of those that stayed away too, and whatever the broadcast of c rounded off."""
    toy = Toy(shares, steps=3)
    for cohort in [(0,), (1,), (0, 1), (1,), (0,)]:
        rounded = {name: c.round(decimals=1) for name, c in toy.c.items()}
        toy.round(cohort, scaffold=True, received=rounded)
        expected = weighted_mean(toy.c_i, shares)["w"].float()
        torch.testing.assert_close(toy.c["w"], expected, rtol=0, atol=1e-5)
    assert toy.c["w"].abs().min() > 0.1


def test_a_clients_variate_is_the_mean_of_its_own_gradients() -> None:
    """Whatever c and c_i were: on 1/2 (w - 1)^2 with weight decay 0.2, it is w - 1 + 0.2 w."""
    model = Quadratic([1.0], [1.0])
    server, client = {"w": torch.tensor([0.7])}, {"w": torch.tensor([-0.4])}
    rule = Scaffold(server, client)
    train(model, lr=0.1, steps=4, descent=SGD, rules=[rule], weight_decay=0.2)
    mean = sum(w.item() - 1 + 0.2 * w.item() for w in model.seen) / 4
    assert rule.variate["w"].item() == pytest.approx(mean, abs=1e-6)
    assert rule.variate["w"].dtype == torch.float32
    assert model.seen[1].item() == pytest.approx(-0.1 * (-1 + 0.4 + 0.7), rel=1e-6)
    assert (server["w"].item(), client["w"].item()) == pytest.approx((0.7, -0.4))


def test_scaffold_moves_a_parameter_that_the_loss_does_not_reach() -> None:
    model = nn.ParameterDict({"w": torch.zeros(1)})
    parameters = dict(model.named_parameters())
    rule = Scaffold({"w": torch.tensor([0.7])}, {"w": torch.tensor([0.5])})
    rule.start(parameters)
    rule.adjust(parameters)
    assert parameters["w"].grad is not None
    assert parameters["w"].grad.item() == pytest.approx(0.2)


def test_what_was_not_trained_keeps_its_variates() -> None:
    one = torch.ones(2)
    rule = Scaffold({"frozen": one, "w": 0 * one}, {"frozen": 3 * one, "w": 0 * one})
    train(Quadratic([1.0, 1.0], [1.0, 1.0]), lr=0.1, steps=1, descent=SGD, rules=[rule])
    assert torch.equal(rule.variate["frozen"], 3 * one)
    c = {"frozen": one, "w": 0 * one}
    after = next_server_variate(c, c, {"w": 0.1 * one.double()}, share=1.0, travelled=0.1)
    assert torch.equal(after["frozen"], one)
    assert torch.equal(after["w"], -one)
