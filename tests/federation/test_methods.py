"""Every aggregation method as a federation: what travels, what stays, what is learned."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedlpp_ray.aggregation import METHODS
from fedlpp_ray.config import ConfigError, Experiment, LoraConfig
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.adapter import ADAPTER_STATE
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.federation.results import result
from fedlpp_ray.federation.sampling import strongest_client
from fedlpp_ray.federation.server import RESIDUAL
from fedlpp_ray.messages import Envelope, decode
from fedlpp_ray.state import part
from tests.federation.test_loop import Recording, interrupted, numbers

QUICK = ("fedit", "fedsa-lora")
"""Methods that the default tests run with an interruption."""


def method(experiment: Experiment, name: str, **values: object) -> Experiment:
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    if name == "fedsa-lora":
        dotted["evaluation.server"] = False
    return experiment.with_values({"server.aggregation": name} | dotted)


def run(experiment: Experiment) -> list[RoundRecord]:
    preflight.check([experiment])
    return list(Federation(experiment, InProcess(experiment)).run())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in METHODS],
)
def test_a_method_learns_and_continues_after_an_interruption(
    tiny_experiment: Experiment, tmp_path: Path, name: str
) -> None:
    experiment = method(
        tiny_experiment, name, federation__rounds=4, federation__local_steps=12, client__lr=2e-2
    )
    first, second = interrupted(experiment, tmp_path, after=2)
    assert numbers(second.history) == numbers(first.history)
    losses = [sum(record.loss) / len(record.loss) for record in first.history]
    if not METHODS[name].writes_base:  # without the residual a client starts anew each round
        assert losses[-1] < losses[0] - 0.01
    outcome = result(experiment, first.history, first.backend.measure_floor())
    assert (outcome["protection"]["server"] is None) == (name == "fedsa-lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_what_is_written_into_the_base_reaches_clients_only_if_it_is_sent(
    tiny_experiment: Experiment, name: str
) -> None:
    base = method(tiny_experiment, name, downlink__bits=32, federation__local_steps=12)
    withheld, sent = (run(base.with_values({"server.send_residual": s})) for s in (False, True))
    evaluations = [history[-1].evaluation for history in (withheld, sent)]
    assert evaluations[0] is not None
    assert evaluations[1] is not None
    assert evaluations[1].server is not None
    assert evaluations[0].client_before != evaluations[0].server
    assert evaluations[1].client_before["accuracy"] == evaluations[1].server["accuracy"]
    assert evaluations[1].client_before["loss"] == pytest.approx(evaluations[1].server["loss"])
    extra = sent[0].ledger[0].down - withheld[0].ledger[0].down
    assert 4 * 64 * 64 * 4 <= extra < 4 * 64 * 64 * 4 + 1000  # four layers of 64 x 64, fp32


def test_a_restored_adapter_has_what_was_written_into_the_base(
    tiny_experiment: Experiment,
) -> None:
    experiment = method(tiny_experiment, "fedex-lora", federation__rounds=2)
    backend = InProcess(experiment)
    list(Federation(experiment, backend).run())
    residuals = safetensors.torch.load(backend.adapter()[RESIDUAL])
    assert len(residuals) == 4
    assert all(tensor.any() for tensor in residuals.values())
    other = InProcess(experiment)
    other.restore(backend.adapter())
    assert other._server.evaluate() == backend._server.evaluate()


def factors(payload: bytes) -> set[str]:
    return {part(name) for name in safetensors.torch.load(payload)}


def test_what_is_not_trained_does_not_travel(tiny_experiment: Experiment) -> None:
    sent = {}
    for name in ("fedit", "ffa-lora", "rolora", "fedsa-lora"):
        experiment = method(tiny_experiment, name, downlink__bits=32, federation__rounds=2)
        backend = Recording(experiment)
        list(Federation(experiment, backend).run())
        ups = [factors(backend.received[r][0]) for r in (1, 2)]
        sent[name] = [factors(backend.sent[r][4]) for r in (1, 2)], ups
    every = {"A", "B", "head"}
    assert sent["fedit"] == ([every, every], [every, every])
    assert sent["ffa-lora"] == ([{"B", "head"}] * 2, [{"B", "head"}] * 2)
    assert sent["rolora"] == ([every, every], [{"B", "head"}, {"A", "head"}])
    assert sent["fedsa-lora"] == ([{"A", "head"}] * 2, [{"A", "head"}] * 2)


def test_ffa_lora_leaves_a_where_it_began(tiny_experiment: Experiment) -> None:
    experiment = method(tiny_experiment, "ffa-lora")
    backend = InProcess(experiment)
    before = safetensors.torch.load(backend.adapter()[ADAPTER_STATE])
    list(Federation(experiment, backend).run())
    after = safetensors.torch.load(backend.adapter()[ADAPTER_STATE])
    for name in before:
        assert torch.equal(before[name], after[name]) == (part(name) == "A"), name


@pytest.mark.parametrize("name", METHODS)
def test_the_floor_is_local_lora_whatever_the_method(
    tiny_experiment: Experiment, name: str
) -> None:
    """RoLoRA's first factor alone would learn nothing while the other is zero."""
    expected = InProcess(tiny_experiment).measure_floor()
    assert InProcess(method(tiny_experiment, name)).measure_floor() == expected


def test_fedsa_clients_keep_their_own_b(tiny_experiment: Experiment) -> None:
    experiment = method(
        tiny_experiment, "fedsa-lora", federation__client_fraction=1.0, federation__rounds=2
    )
    federation = Federation(experiment, InProcess(experiment))
    stream = federation.run()
    next(stream)
    memories = federation.snapshot().memories
    first = {c: safetensors.torch.load(m.read()) for c, m in memories.items()}
    assert set(first) == set(range(8))
    assert all({part(n) for n in kept} == {"B"} for kept in first.values())
    name = next(iter(first[0]))
    assert not torch.equal(first[0][name], first[1][name])
    # What a client does next depends on what it kept.
    host = federation.backend._host  # type: ignore[attr-defined]
    broadcast = federation.backend.encode_broadcast(2)
    updates = [host.train(2, 0, broadcast, memories[c].read()).payload for c in (0, 0, 1)]
    assert updates[0] == updates[1] != updates[2]


def test_a_client_of_a_smaller_rank_trains_as_if_its_adapter_were_of_that_rank(
    tiny_experiment: Experiment,
) -> None:
    """Against a host whose adapter has that rank, from the same broadcast. Tolerance 1e-5."""
    mixed = method(
        tiny_experiment,
        "flexlora",
        lora__rank=4,
        lora__client_ranks=[2, 4],
        downlink__bits=32,
    )
    small = mixed.with_values({"lora.rank": 2, "lora.client_ranks": None})
    generator = torch.Generator().manual_seed(0)
    backend, host = InProcess(mixed), ClientHost(small)
    state = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in host._initial.items()}
    from fedlpp_ray.messages import Codec, encode

    broadcast = {2: encode(Envelope("broadcast", 1), state, Codec(None)), 4: b""}
    updates = []
    for party in (backend._host, host):
        update = party.train(1, 0, broadcast)
        expected = Envelope("update", 1, 0, party._text.examples[0])
        schema = party._wire.update(1, 2)
        updates.append((decode(update.payload, expected, schema, Codec(None)), update.loss))
    assert updates[0][1] == pytest.approx(updates[1][1], abs=1e-5)
    for name, tensor in updates[1][0].items():
        torch.testing.assert_close(updates[0][0][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flexlora", "hetlora", "flora"])
def test_clients_of_several_ranks_are_sent_and_send_their_own(
    tiny_experiment: Experiment, name: str
) -> None:
    experiment = method(
        tiny_experiment,
        name,
        lora__rank=4,
        lora__client_ranks=[1, 4],
        downlink__bits=8,
        federation__client_fraction=1.0,
    )
    (record, *_) = run(experiment)
    by_rank = {
        rank: {t.down for t in record.ledger if t.client % 2 == i} for i, rank in ((0, 1), (1, 4))
    }
    assert all(len(sizes) == 1 for sizes in by_rank.values())
    ups = {t.client % 2: t.up for t in record.ledger}
    # One rank of 4 layers of 64 x 64 is 512 parameters, fp32 up.
    assert ups[1] - ups[0] == pytest.approx(3 * 512 * 4, abs=64)
    assert by_rank[4].pop() - by_rank[1].pop() == pytest.approx(3 * 512 * (1 + 4 / 64), abs=64)


def test_the_measured_client_is_of_the_largest_rank() -> None:
    """A client of a smaller rank has a coarser model: measuring it would understate the leak."""
    mixed = LoraConfig(rank=8, client_ranks=(2, 8))
    assert strongest_client(mixed, [90, 5, 80, 7, 70, 7]) == 3
    assert strongest_client(LoraConfig(rank=8), [5, 9, 9]) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora.client_ranks": [2, 4]}, r"'fedit' adds A and B of one rank.*hetlora"),
        ({"server.aggregation": "fedsa-lora"}, r"leaves B at the clients.*evaluation.server=false"),
        ({"server.send_residual": True}, r"'fedit' writes nothing.*flora, fedex-lora"),
        ({"server.aggregation": "nonsense"}, r"server.aggregation = 'nonsense': allowed: fedit"),
    ],
)
def test_bad_combinations_are_refused_before_compute(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        preflight.check([tiny_experiment.with_values(values)])


def test_client_ranks_above_the_servers_are_refused(tiny_experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match=r"lora.client_ranks: 8 is above lora.rank = 4"):
        tiny_experiment.with_values({"lora.client_ranks": [2, 8]})


OWN = """
from fedlpp_ray.aggregation import Method
from fedlpp_ray.aggregation.methods import mean_update


def sign(returns, broadcast):
    return {name: 1e-3 * mean.sign() for name, mean in mean_update(returns, broadcast).items()}


SIGN = Method(direction=sign)
"""


def test_a_method_of_ones_own_is_found_by_its_module(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_method.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    experiment = method(tiny_experiment, "own_method:SIGN", federation__rounds=1)
    backend = InProcess(experiment)
    before = safetensors.torch.load(backend.adapter()[ADAPTER_STATE])
    list(Federation(experiment, backend).run())
    after = safetensors.torch.load(backend.adapter()[ADAPTER_STATE])
    for name in before:
        moved = (after[name] - before[name]).abs()
        assert moved.max() == pytest.approx(1e-3, rel=1e-3)
