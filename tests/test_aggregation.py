"""The server's rules and the weighted mean, against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from fedlpp_ray.aggregation import make_optimizer, next_state, weighted_mean


def test_the_mean_is_weighted() -> None:
    returns = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([3.0, 4.0])}]
    assert weighted_mean(returns, [0.25, 0.75])["x"].tolist() == [2.5, 3.0]
    assert weighted_mean(returns, [10, 30])["x"].tolist() == [2.5, 3.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("residual", 1.0 + 0.5 * 0.2),  # S + lr (K - D)
        ("replace", 0.8 + 0.5 * 0.2),  # D + lr (K - D)
        ("pull", 1.0 + 0.5 * (0.8 + 0.2 - 1.0)),  # S + lr (K - S)
    ],
)
def test_each_rule_is_its_formula(rule: str, expected: float) -> None:
    state, broadcast = {"x": torch.tensor([1.0])}, {"x": torch.tensor([0.8])}
    mean = {"x": torch.tensor([0.2], dtype=torch.float64)}
    after = next_state(rule, state, broadcast, mean, make_optimizer("fedavg", {"x": (1,)}, lr=0.5))
    assert after["x"].dtype == torch.float32
    assert after["x"].item() == pytest.approx(expected, rel=1e-6)
    assert state["x"].item() == 1.0


def test_without_quantization_and_at_lr_1_all_rules_are_fedavg() -> None:
    state = {"x": torch.randn(50)}
    mean = {"x": torch.randn(50, dtype=torch.float64)}
    results = [
        next_state(rule, state, state, mean, make_optimizer("fedavg", {"x": (50,)}, lr=1.0))["x"]
        for rule in ("residual", "replace", "pull")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-6)
