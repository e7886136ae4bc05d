"""Federations in which some clients attack, and what a robust rule is refused with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from fedlpp_ray.aggregation import ROBUST, Method
from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.footprint import estimate
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.sampling import sample_cohort
from fedlpp_ray.federation.server import Server
from fedlpp_ray.messages import Envelope, decode, encode
from fedlpp_ray.state import State, part
from tests.federation.test_aggregator import made_up, opened
from tests.federation.test_loop import interrupted, numbers
from tests.federation.test_rounds import FEDBUFF, faults, folded

ATTACKERS = (2, 5)
ROBUSTLY: dict[str, object] = {
    "server.weighting": "uniform",
    "server.byzantine": len(ATTACKERS),
    "federation.client_fraction": 1.0,
    "federation.min_updates": 7,
    "federation.rounds": 2,
}
"""Eight clients, of which two attack: 2 f + 3 is 7."""
Attack = Literal["none", "together", "apart"]


class Poisoning(InProcess):
    """Some clients' updates become ones of norm 900, within `server.max_update_norm`.

    Args:
        experiment: What to run, with fp32 updates.
        attack: `together`: all attackers send the same. `apart`: each its own turned round.
    """

    def __init__(self, experiment: Experiment, attack: Attack) -> None:
        super().__init__(experiment)
        verdict, server = self._server.verdict, self._server

        def poisoned(round: int, client: int, payload: bytes) -> str | None:
            if attack == "none" or client not in ATTACKERS:
                return verdict(round, client, payload)
            schema, codec = server._wire.update(round, experiment.lora.rank), server._wire.uplink
            envelope = Envelope("update", round, client, server.examples()[client])
            state = decode(payload, envelope, schema, codec)
            if attack == "together":
                state = {name: torch.ones(shape) for name, shape in schema.items()}
            factor = -900 / norm(state)
            state = {name: factor * tensor for name, tensor in state.items()}
            return verdict(round, client, encode(envelope, state, codec))

        self._server.verdict = poisoned  # type: ignore[method-assign]


def norm(state: Mapping[str, torch.Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in state.values()) ** 0.5


def apart(one: State, other: State) -> float:
    return norm({name: one[name] - other[name] for name in one})


def after(experiment: Experiment, attack: Attack = "none") -> State:
    """The server's state after the rounds, in which everyone was folded."""
    backend = Poisoning(experiment, attack)
    for record in Federation(experiment, backend).run():
        assert folded(record) == list(range(8))
    return backend._server._state


def robust(experiment: Experiment, rule: str, **values: object) -> Experiment:
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    return experiment.with_values(ROBUSTLY | {"server.robust": rule} | dotted)


# Under attack


@pytest.fixture(scope="module")
def clean(tiny_experiment: Experiment) -> tuple[State, float]:
    """The state of the mean without attackers, and how far it has gone."""
    mean = robust(tiny_experiment, "none", server__byzantine=0)
    state = after(mean)
    return state, apart(state, Server(mean)._state)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["together", "apart"])
@pytest.mark.parametrize("rule", ["none", *ROBUST])
def test_attackers_carry_off_the_mean_and_no_robust_rule(
    tiny_experiment: Experiment, clean: tuple[State, float], rule: str, attack: Attack
) -> None:
    """Two of eight clients, two rounds. Robust rules stay within twice the way of the clean run of
    it (measured: 0.5 to 1.7 times, and 360 to 650 times the mean)."""
    state, way = clean
    values = {} if rule != "none" else {"server__byzantine": 0}
    experiment = robust(tiny_experiment, rule, **values)
    preflight.check([experiment])
    distance = apart(after(experiment, attack), state)
    assert distance > 200 * way if rule == "none" else distance < 2 * way


@pytest.mark.parametrize("rule", ["krum", "geometric-median"])
def test_a_fedbuff_run_goes_on_with_the_same_bits(
    tiny_experiment: Experiment, tmp_path: Path, rule: str
) -> None:
    """Updates of clients that started in other rounds, each discounted, then the rule."""
    values = FEDBUFF | {
        "federation.client_fraction": 1.0,
        "federation.buffer": 5,
        "federation.min_updates": 5,
        "federation.rounds": 4,
        "server.robust": rule,
        "server.byzantine": 1,
        "server.weighting": "uniform",
        "server.optimizer": "fedavgm",
    }
    experiment = tiny_experiment.with_values(values)
    preflight.check([experiment])
    whole, restored = interrupted(experiment, tmp_path, after=2)
    assert any(client.staleness for record in whole.history for client in record.folded)
    assert numbers(restored.history) == numbers(whole.history)


def test_a_round_that_is_left_with_too_few_is_abandoned(tiny_experiment: Experiment) -> None:
    experiment = robust(
        tiny_experiment,
        "krum",
        federation__client_fraction=0.875,
        federation__rounds=1,
    )
    preflight.check([experiment])
    backend = InProcess(experiment)
    before, verdict = dict(backend._server._state), backend._server.verdict
    victim = sample_cohort(experiment.federation, experiment.seed, 1)[0]
    backend._server.verdict = (  # type: ignore[method-assign]
        lambda r, c, payload: verdict(r, c, payload[:-1] if c == victim else payload)
    )
    (record,) = Federation(experiment, backend).run()
    assert faults(record)[victim] == "refused"
    assert sorted(faults(record).values()) == ["abandoned"] * 6 + ["refused"]
    assert apart(backend._server._state, before) == 0


# What the rule is given, and what becomes of it


def closed(experiment: Experiment, clients: Sequence[int], huge: Sequence[int] = ()) -> Server:
    """A server after a round of made-up updates, those of some of norm 900."""
    server = Server(experiment)
    opened(server, clients)
    for client in clients:
        payload = made_up(server, client)
        if client in huge:
            length = norm(decoded(server, client))
            payload = made_up(server, client, scale=0.01 * 900 / length)
        server.receive(1, client, payload)
    server.aggregate(1)
    return server


def decoded(server: Server, client: int) -> State:
    envelope = Envelope("update", 1, client, server.examples()[client])
    schema = server._wire.update(1, server._experiment.lora.rank)
    return decode(made_up(server, client), envelope, schema, server._wire.uplink)


def test_what_multi_krum_leaves_is_the_mean_of_the_honest(tiny_experiment: Experiment) -> None:
    """Six of eight, as if the others had not returned. Tolerance: fp32."""
    rule = robust(tiny_experiment, "multi-krum", server__rule="replace", server__lr=0.5)
    mean = rule.with_values({"server.robust": "none", "server.byzantine": 0})
    honest = [client for client in range(8) if client not in ATTACKERS]
    found, expected = closed(rule, range(8), huge=ATTACKERS), closed(mean, honest)
    for name, tensor in expected._state.items():
        torch.testing.assert_close(found._state[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
def test_the_servers_rule_goes_on_from_the_robust_update(
    tiny_experiment: Experiment, rule: str
) -> None:
    """The median, by torch.quantile; in full precision D is S. Tolerance: fp32."""
    values = {"server__rule": rule, "server__lr": 0.5, "downlink__bits": 32}
    server = closed(experiment := robust(tiny_experiment, "median", **values), range(8))
    updates = [decoded(server, client) for client in range(8)]
    for name, before in Server(experiment)._state.items():
        median = torch.stack([each[name] for each in updates]).double().quantile(0.5, dim=0)
        torch.testing.assert_close(
            server._state[name], before + 0.5 * median.float(), rtol=0, atol=1e-7
        )


def test_momentum_remembers_the_robust_update(tiny_experiment: Experiment) -> None:
    values = {"server__optimizer": "fedavgm", "downlink__bits": 32}
    server = closed(robust(tiny_experiment, "median", **values), range(8), huge=ATTACKERS)
    assert norm(server._optimizer.state_dict()) < 1


def test_a_method_that_trains_some_parts_has_the_rule_on_these(
    tiny_experiment: Experiment,
) -> None:
    experiment = robust(tiny_experiment, "geometric-median", server__aggregation="rolora")
    preflight.check([experiment])
    before, server = Server(experiment)._state, closed(experiment, range(8), huge=ATTACKERS)
    moved = {part(name) for name in before if not torch.equal(before[name], server._state[name])}
    assert moved == {"B", "head"}
    assert apart(before, server._state) < 1


def test_what_the_server_keeps_is_what_is_estimated(tiny_experiment: Experiment) -> None:
    """4 bytes of each number for each client, 8 of the rule's result and 4 of the next state."""
    experiment = robust(tiny_experiment, "trimmed-mean")
    server = Server(experiment)
    opened(server, range(8))
    for client in range(8):
        server.receive(1, client, made_up(server, client))
    held = server._aggregator.total.tensors()  # type: ignore[union-attr]
    numbers = sum(tensor.numel() for tensor in server._state.values())
    assert sum(tensor.nbytes for tensor in held.values()) == 8 * 4 * numbers
    # The head has three classes, the estimate two.
    folding = estimate(experiment, "server").folding
    assert folding == pytest.approx((8 * 4 + 8 + 4) * numbers, rel=0.05)


# What is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server.weighting": "examples"}, r"'krum': server.weighting 'examples' .*: uniform"),
        ({"server.aggregation": "flora"}, r"'flora' does not take the mean of the updates"),
        ({"server.aggregation": "fedex-lora"}, r"'fedex-lora' does not take the mean"),
        ({"server.aggregation": "flexlora"}, r"'flexlora' does not take the mean"),
        ({"server.aggregation": "lora-fair"}, r"'lora-fair' does not take the mean"),
        ({"server.aggregation": "hetlora"}, r"'hetlora' does not take the mean"),
        (
            {"client.scaffold": True, "client.optimizer": "sgd"},
            r"client.scaffold moves the server's variate by the mean",
        ),
        ({"downlink.client_mask": 0.2}, r"downlink.client_mask has every client train other"),
        (
            {"server.aggregation": f"{__name__}:MIXED", "lora.client_ranks": [2, 4]},
            r"lora.client_ranks gives clients other rows",
        ),
        ({"server.byzantine": 0}, r"server.byzantine = 0 leaves nothing out.*allowed: 1 or more"),
        ({"server.byzantine": 3}, r"round of 8 updates is too small: it needs 9 updates, 2 server"),
        (
            {"federation.min_updates": 6},
            r"federation.min_updates = 6 lets .* needs 7 updates, 2 server.byzantine \+ 3",
        ),
        (
            {"federation.mode": "fedbuff", "federation.min_updates": 4},
            r"a round of 4 updates is too small: it needs 7",
        ),
        ({"server.robust": "none"}, r"server.byzantine = 2: server.robust 'none' tolerates no"),
    ],
)
def test_bad_combinations_are_refused_before_compute(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    experiment = robust(tiny_experiment, "krum").with_values(values)
    with pytest.raises(ConfigError, match=words):
        preflight.check([experiment])


MIXED = Method(mixed_ranks=True)


@pytest.mark.parametrize(
    ("rule", "byzantine", "needed"),
    [("median", 3, 7), ("trimmed-mean", 3, 7), ("geometric-median", 3, 7), ("multi-krum", 2, 7),
     ("median", 0, 1)],
)  # fmt: skip
def test_the_fewest_updates_are_enough(
    tiny_experiment: Experiment, rule: str, byzantine: int, needed: int
) -> None:
    values = {"server__byzantine": byzantine, "federation__min_updates": needed}
    experiment = robust(tiny_experiment, rule, **values)
    preflight.check([experiment])
    if needed > 1:
        with pytest.raises(ConfigError, match=f"it needs {needed} updates"):
            preflight.check([experiment.with_values({"federation.min_updates": needed - 1})])


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"downlink.server_mask": 0.2},
        {"downlink.rotate": "round", "downlink.every": 2},
        {"downlink.rotate": "client", "downlink.perturbation": 0.5},
        {"uplink.bits": 4, "uplink.error_feedback": True},
        {"adapter.kind": "prompt", "adapter.tokens": 4},
        {"server.aggregation": "ffa-lora"},
        {"server.aggregation": "fedsa-lora", "evaluation.server": False},
        {"lora.client_ranks": [4, 4]},
    ],
)
def test_what_goes_with_a_robust_rule(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    """Two rounds each, in which all are folded."""
    experiment = robust(tiny_experiment, "krum").with_values(values)
    preflight.check([experiment])
    for record in Federation(experiment, InProcess(experiment)).run():
        assert len(record.folded) == 8
