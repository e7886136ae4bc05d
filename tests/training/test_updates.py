"""Steps that several ranks make together, of a model in which each reaches other parameters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fedlpp_ray.config import ClientConfig
from fedlpp_ray.state import State
from fedlpp_ray.tasks import Encoded
from fedlpp_ray.training import ALONE, ClientRule, Descent, FedProx, Group, Scaffold, Training
from tests.ranks import Ranks

CPU = torch.device("cpu")
EXPERTS, WIDTH, CLASSES = 4, 3, 2
ONE_EACH: Encoded = [(torch.tensor([expert, 7]), expert % 2) for expert in (0, 1, 0, 2)]
"""Of so few no rank has an example for each expert."""
ALL: Encoded = [(torch.tensor([i % EXPERTS, i % 32]), i // EXPERTS % 2) for i in range(64)]


class Routed(nn.Module):
    """A text goes by its first word to one expert; the last one is never reached by `ONE_EACH`."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.words = torch.randn(32, WIDTH, generator=draw)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(EXPERTS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        experts, found = input_ids[:, 0], {}
        for expert in sorted(set(experts.tolist())):
            rows = (experts == expert).nonzero().flatten().tolist()
            logits = self.experts[expert](self.words[input_ids[rows, 1]])
            found |= dict(zip(rows, logits, strict=True))
        return SimpleNamespace(logits=torch.stack([found[row] for row in range(len(experts))]))


def train(group: Group, examples: Encoded, rule: str) -> tuple[float, State]:
    """The loss, and the parameters that remain."""
    model = Routed()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    rules: dict[str, list[ClientRule]] = {
        "none": [],
        "FedProx": [FedProx(0.1)],
        "SCAFFOLD": [Scaffold({name: zero + 0.1 for name, zero in zeros.items()}, zeros)],
    }
    loss = Training(
        model,
        examples,
        ClientConfig(lr=1e-1, weight_decay=0.1, batch_size=len(examples)),
        steps=3,
        seed=0,
        pad=0,
        device=CPU,
        descent=Descent("sgd" if rule == "SCAFFOLD" else "adamw"),
        rules=rules[rule],
        group=group,
    ).run()
    return loss, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["none", "FedProx", "SCAFFOLD"])
@pytest.mark.parametrize("size", ["two", "four"])
def test_experts_that_only_some_ranks_reach_are_trained_as_by_one_process(
    request: pytest.FixtureRequest, size: str, rule: str
) -> None:
    """What no rank reaches is left alone, also by weight decay."""
    ranks: Ranks = request.getfixturevalue(size)
    loss, expected = train(ALONE, ONE_EACH, rule)
    for found, state in ranks.run(train, ONE_EACH, rule):
        assert found == pytest.approx(loss, abs=1e-5)
        for name, tensor in expected.items():
            assert torch.allclose(state[name], tensor, atol=1e-5), name
    before = dict(Routed().named_parameters())
    still = {name for name, tensor in expected.items() if torch.equal(tensor, before[name])}
    never = {f"experts.{EXPERTS - 1}.weight", f"experts.{EXPERTS - 1}.bias"}
    assert still == (set() if rule == "SCAFFOLD" else never)


def summed(group: Group, examples: Encoded) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What ranks add up in a training, before and after."""
    before, after, add = [], [], group.add

    def noted(tensors: list[Tensor]) -> None:
        before.append([tensor.clone() for tensor in tensors])
        add(tensors)
        after.append([tensor.clone() for tensor in tensors])

    group.add = noted  # type: ignore[method-assign, assignment]
    try:
        train(group, examples, "none")
    finally:
        group.add = add  # type: ignore[method-assign]
    return before, after


def test_ranks_that_reach_all_add_what_they_have_and_no_more(two: Ranks) -> None:
    """One tensor of zeros more in the message, and sums over four ranks might round otherwise."""
    (first, sums), (second, others) = two.run(summed, ALL)
    shapes = [tuple(p.shape) for p in dict(sorted(Routed().named_parameters())).values()]
    assert [[tuple(t.shape) for t in each] for each in first] == [shapes] * 3 + [[(3,)]]
    for own, theirs, total, other in zip(first, second, sums, others, strict=True):
        for a, b, c, d in zip(own, theirs, total, other, strict=True):
            assert a.any()
            assert b.any()
            assert torch.equal(a + b, c)
            assert torch.equal(c, d)
