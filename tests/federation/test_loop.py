"""One run: what is sent, what is counted, what is measured, and that it repeats bit for bit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import (
    Assignment,
    ClientReport,
    Federation,
    RoundRecord,
    checkpoint,
)
from fedlpp_ray.federation.clock import PHASES
from fedlpp_ray.federation.in_process import InProcess, in_process
from fedlpp_ray.federation.records import Measured, Memory
from fedlpp_ray.federation.results import result, run_protection, to_json
from fedlpp_ray.federation.sampling import sample_cohort
from fedlpp_ray.federation.secure import Masking
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.wire import Broadcast, downlink_codec
from fedlpp_ray.messages import Envelope, decode
from fedlpp_ray.quantization import Quantizer
from fedlpp_ray.state import is_head, schema_of
from fedlpp_ray.tracking.metrics import final_metrics, metric_names, round_metrics


class Recording(InProcess):
    """Remembers every message that passed."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.sent: dict[int, Broadcast] = {}  # the one in force in each round
        self.received: dict[int, list[bytes]] = {}  # by round, in the order of arrival
        verdict = self._server.verdict

        def recorded(round: int, client: int, payload: bytes) -> str | None:
            self.received.setdefault(round, []).append(payload)
            return verdict(round, client, payload)

        self._server.verdict = recorded  # type: ignore[method-assign]

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        maskings: Mapping[int, Masking] | None = None,
    ) -> Iterator[ClientReport]:
        self.sent[round] = broadcasts[self._made_in(round)]
        return super().train(round, cohort, broadcasts, maskings)


def run(experiment: Experiment) -> list[RoundRecord]:
    return list(Federation(experiment, InProcess(experiment)).run())


def numbers(history: Sequence[RoundRecord]) -> list[dict[str, object]]:
    """Everything of a history but its times."""
    return [record.to_dict() | {"seconds": None} for record in history]


def interrupted(
    experiment: Experiment, folder: Path, *, after: int
) -> tuple[Federation, Federation]:
    """A whole run, and one that another process goes on with from its checkpoint."""
    whole = Federation(experiment, in_process(experiment))
    rounds = whole.run()
    for _ in range(after):
        next(rounds)
    checkpoint.save(whole, folder)
    list(rounds)
    restored = Federation(experiment, in_process(experiment))
    checkpoint.restore(restored, folder)
    list(restored.run())
    return whole, restored


def cohort(round: int, *clients: int) -> dict[Assignment, Memory]:
    """Clients that start in a round and have kept nothing."""
    return {Assignment(client, round): None for client in clients}


def tensor_bytes(payload: bytes) -> int:
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


def test_the_ledger_is_the_bytes_counted_by_hand(tiny_experiment: Experiment) -> None:
    """Tiny BERT at rank 4: A (4, 64) and B (64, 4) on 4 layers, head (3, 64) and (3)."""
    experiment = tiny_experiment.with_values({"downlink.bits": 3, "federation.rounds": 2})
    backend = Recording(experiment)
    history = list(Federation(experiment, backend).run())
    factors, head, bias = 8, 3 * 64, 3
    quantized = factors * (256 * 3 // 8 + 256 // 64 * 4) + (head * 3 // 8 + 3 * 4) + (1 + 1 + 4)
    whole = 4 * (factors * 256 + head + bias)
    for record in history:
        assert len(record.ledger) == experiment.federation.cohort_size == 4
        payload, updates = backend.sent[record.round][4], backend.received[record.round]
        assert tensor_bytes(payload) == quantized
        assert list(map(tensor_bytes, updates)) == [whole] * 4
        assert [t.down for t in record.ledger] == [len(payload)] * 4
        assert [t.up for t in record.ledger] == list(map(len, updates))
        sent = record.to_dict()["bytes"]
        assert sent == {"down": 4 * len(payload), "up": sum(t.up for t in record.ledger)}


@pytest.mark.parametrize("full_precision_head", [False, True])
def test_the_head_travels_quantized_unless_asked_otherwise(
    tiny_experiment: Experiment, full_precision_head: bool
) -> None:
    values = {"downlink.bits": 2, "downlink.full_precision_head": full_precision_head}
    experiment = tiny_experiment.with_values(values)
    server = Server(experiment)
    state = dict(server._state)
    codec = downlink_codec(experiment.downlink, schema_of(state))
    payload = server.encode_broadcast(1)[experiment.lora.rank]
    received = decode(payload, Envelope("broadcast", 1), schema_of(state), codec)
    for name, tensor in state.items():
        exact = full_precision_head and is_head(name)
        expected = tensor if exact else Quantizer(2).quantize(tensor).dequantize()
        assert torch.equal(received[name], expected), name
    assert any(is_head(name) for name in state)


def test_without_quantization_a_client_has_the_servers_model(tiny_experiment: Experiment) -> None:
    history = run(tiny_experiment.with_values({"downlink.bits": 32}))
    for record in history:
        assert record.evaluation is not None
        assert record.evaluation.client_before == record.evaluation.server
        assert record.evaluation.client_after != record.evaluation.server


@pytest.mark.parametrize("values", [{"downlink.bits": 2}, {"client.base_bits": 2}])
def test_either_quantization_changes_what_the_client_has(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    last = run(tiny_experiment.with_values({"downlink.bits": 32} | values))[-1].evaluation
    assert last is not None
    assert last.client_before["loss"] != last.server["loss"]


def test_client_after_is_the_strongest_clients_model(tiny_experiment: Experiment) -> None:
    """Reproduced from the parties: decode, train the largest client, evaluate."""
    experiment = tiny_experiment.with_values(
        {"federation.partition": "dirichlet", "federation.rounds": 1}
    )
    backend = InProcess(experiment)
    (record,) = Federation(experiment, backend).run()
    examples = backend._host._text.examples
    largest = examples.index(max(examples))
    broadcast = backend.encode_broadcast(2)
    backend._host.train(2, largest, broadcast)

    host = backend._host
    after = host._text.evaluate(host._model, host._device)
    assert record.evaluation is not None
    assert after == record.evaluation.client_after


def test_training_learns(tiny_experiment: Experiment) -> None:
    values = {"federation.rounds": 8, "federation.local_steps": 10, "evaluation.every": 8}
    backend = InProcess(tiny_experiment.with_values(values))
    history = list(Federation(tiny_experiment.with_values(values), backend).run())
    floor = backend.measure_floor()
    assert [record.evaluation is not None for record in history] == [False] * 7 + [True]
    last = history[-1].evaluation
    assert last is not None
    assert last.server["accuracy"] > 0.9
    assert floor.base["accuracy"] < 0.6
    protection = run_protection(history, floor)
    best = max(last.client_before["accuracy"], last.client_after["accuracy"])
    assert protection.strongest[1] == best
    assert protection.strongest[0].endswith("of round 8")


def test_one_seed_gives_the_same_bits_and_another_other_ones(tiny_experiment: Experiment) -> None:
    torch.manual_seed(1)
    one = run(tiny_experiment)
    torch.manual_seed(2)
    same, other = run(tiny_experiment), run(tiny_experiment.with_values({"seed": 1}))
    assert numbers(one) == numbers(same)
    assert one[-1].digest != other[-1].digest


def test_dropout_and_stochastic_rounding_repeat_too(tiny_experiment: Experiment) -> None:
    values = {"lora.dropout": 0.3, "downlink.bits": 2, "downlink.rounding": "stochastic"}
    experiment = tiny_experiment.with_values(values)
    assert numbers(run(experiment)) == numbers(run(experiment))


def test_bf16_repeats_and_leaves_the_server_and_what_travels_in_fp32(
    tiny_experiment: Experiment,
) -> None:
    """The server measures its first state alike; a client measures it in bf16."""
    experiment = tiny_experiment.with_values({"client.compute": "bf16"})
    assert numbers(run(experiment)) == numbers(run(experiment))
    half, full = InProcess(experiment), InProcess(tiny_experiment)
    assert half._server.evaluate() == full._server.evaluate()
    sent = full.encode_broadcast(1)
    assert half.encode_broadcast(1) == sent
    ours, theirs = (backend._host.train(1, 0, sent) for backend in (half, full))
    assert len(ours.payload) == len(theirs.payload)
    assert ours.payload != theirs.payload
    assert ours.loss == pytest.approx(theirs.loss, rel=0.02)


def test_a_restored_run_goes_on_with_the_same_bits(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    whole, restored = interrupted(tiny_experiment, tmp_path, after=1)
    assert numbers(restored.history) == numbers(whole.history) == numbers(run(tiny_experiment))
    other = tiny_experiment.with_values({"seed": 5})
    with pytest.raises(ConfigError, match="another experiment"):
        checkpoint.restore(Federation(other, InProcess(other)), tmp_path)


def test_the_server_refuses_a_hostile_update_and_keeps_its_state(
    tiny_experiment: Experiment,
) -> None:
    experiment = tiny_experiment.with_values({"server.max_update_norm": 1e-6})
    backend = InProcess(experiment)
    broadcast, before = backend.encode_broadcast(1, [0]), dict(backend._server._state)
    reports = list(backend.train(1, cohort(1, 0, 1), {1: broadcast}))
    for report in reports:
        assert report.fault is not None
        assert report.fault.kind == "refused"
        assert re.search(r"norm is .* allowed is 1e-06", report.fault.reason)
    backend.aggregate(1)
    assert all(torch.equal(backend._server._state[n], x) for n, x in before.items())


def test_cohorts_have_no_repeats_vary_by_round_and_reach_everyone() -> None:
    config = Experiment().federation.model_copy(update={"clients": 10, "client_fraction": 0.3})
    cohorts = [sample_cohort(config, 0, r) for r in range(1, 60)]
    assert all(len(set(cohort)) == 3 for cohort in cohorts)
    assert all(cohort == tuple(sorted(cohort)) for cohort in cohorts)
    assert len(set(cohorts)) > 20
    assert {client for cohort in cohorts for client in cohort} == set(range(10))


def test_a_result_is_complete_and_a_history_survives_json(tiny_experiment: Experiment) -> None:
    backend = InProcess(tiny_experiment)
    history = list(Federation(tiny_experiment, backend).run())
    outcome = result(tiny_experiment, history, backend.measure_floor())
    known = {"config", "history", "final", "floor", "protection", "threat", "ladder", "seconds"}
    assert set(outcome) == known | {"versions", "seed"}
    assert set(outcome["history"][0]) >= {
        "round", "server", "client_before", "client_after", "bytes", "seconds"
    }  # fmt: skip
    assert Experiment.from_dict(outcome["config"]) == tiny_experiment
    assert [RoundRecord.from_dict(record) for record in outcome["history"]] == history
    assert set(outcome["versions"]) >= {"python", "torch", "transformers", "peft", "ray"}


def test_what_is_not_a_number_is_null_in_json() -> None:
    """A JSON text has no NaN, and a reader in another language would refuse it."""
    outcome = {"a": [math.nan, {"b": (1.5, -math.inf)}], "c": 3, "d": True, "e": "nan", "f": None}
    text = to_json(outcome)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, {"b": [1.5, None]}], "c": 3, "d": True, "e": "nan", "f": None
    }  # fmt: skip


def test_the_metrics_of_a_run_are_those_that_a_search_may_ask_for(
    tiny_experiment: Experiment,
) -> None:
    backend = InProcess(tiny_experiment)
    history = list(Federation(tiny_experiment, backend).run())
    outcome = result(tiny_experiment, history, backend.measure_floor())
    found = round_metrics(history) | final_metrics(outcome)
    assert set(found) == set(metric_names(tiny_experiment))


def test_a_checkpoint_holds_the_state_also_of_rounds_that_are_not_evaluated(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    experiment = tiny_experiment.with_values({"evaluation.every": 3})
    whole, restored = interrupted(experiment, tmp_path, after=1)
    assert numbers(restored.history) == numbers(whole.history)


class TwoHosts(InProcess):
    """Clients that say that they computed for a tenth of a second, on two hosts in turn."""

    def train(self, *arguments: Any) -> Iterator[ClientReport]:
        for number, report in enumerate(super().train(*arguments)):
            yield replace(report, seconds=0.1, host=number % 2)


def test_overhead_is_what_the_busiest_host_and_the_evaluation_leave_of_the_total(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by a second each time that it is read."""
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("fedlpp_ray.federation.clock.time", clock)
    backend = TwoHosts(tiny_experiment)
    evaluate = backend.evaluate
    monkeypatch.setattr(
        backend, "evaluate", lambda *a: lambda: Measured(evaluate(*a)().evaluation, 3.0)
    )
    for record in Federation(tiny_experiment, backend).run():
        seconds = record.seconds
        assert seconds["client_compute"] == pytest.approx(0.2)  # two of four on either host
        assert seconds["overhead"] == pytest.approx(seconds["total"] - 0.2 - 3.0)
        waited = [seconds[phase] for phase in (*PHASES, "record")]
        assert sum(waited) == pytest.approx(seconds["total"])
        assert min(waited) > 0
        assert set(seconds) == {
            *PHASES, "record", "total", "client_compute", "overhead", "leak", "simulated"
        }  # fmt: skip


def test_an_epoch_is_a_pass_over_a_clients_own_examples(tiny_experiment: Experiment) -> None:
    """320 examples at 8 clients by Dirichlet: each makes its own number of steps of 8."""
    values = {
        "federation.local_steps": None,
        "federation.local_epochs": 2,
        "federation.partition": "dirichlet",
        "federation.rounds": 1,
    }
    backend = InProcess(tiny_experiment.with_values(values))
    text = backend._host._text
    sizes = [len(text.client(client)) for client in range(8)]
    assert len(set(sizes)) > 1
    assert [text.steps(client) for client in range(8)] == [2 * -(-size // 8) for size in sizes]
    # One epoch of the cohort's client 0 is as many steps by that name.
    same = {**values, "federation.local_epochs": None, "federation.local_steps": text.steps(0)}
    one = InProcess(tiny_experiment.with_values(same))
    broadcast = backend.encode_broadcast(1, [0])
    assert backend._host.train(1, 0, broadcast).payload == one._host.train(1, 0, broadcast).payload
