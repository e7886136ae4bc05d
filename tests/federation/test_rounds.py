"""Rounds in which not everyone returns, or returns late, or returns nonsense, or a server is lost.

What the loop makes of them is compared with parties that are called by hand, one after the other.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import (
    Assignment,
    ClientReport,
    Evaluation,
    Federation,
    RoundRecord,
    checkpoint,
    preflight,
)
from fedlpp_ray.federation.adapter import ADAPTER_STATE
from fedlpp_ray.federation.backend import ServerLost
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.records import ClientRecord, Memory
from fedlpp_ray.federation.recovery import LOSSES, finished_rounds
from fedlpp_ray.federation.results import result, to_json
from fedlpp_ray.federation.sampling import sample_cohort
from fedlpp_ray.federation.schedule import Schedule
from fedlpp_ray.federation.secure import Masking
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.lora import trainable
from fedlpp_ray.messages import MessageError
from fedlpp_ray.state import state_digest
from fedlpp_ray.tracking.metrics import metric_names, round_metrics
from tests.federation.test_loop import interrupted, numbers, run

FEDBUFF = {
    "federation.mode": "fedbuff",
    "federation.buffer": 2,
    "federation.partition": "dirichlet",
    "federation.rounds": 6,
    "federation.local_steps": 2,
    "simulation.speed_spread": 1.0,
}


class ByHand:
    """A server and a client host without a loop; clients start in the round in which they return.

    Args:
        experiment: What to run; no client keeps anything.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.server, self.host = Server(experiment), ClientHost(experiment)

    def round(self, round: int, clients: Sequence[int]) -> str:
        """One round of just these clients, the last first; the digest of the state after it."""
        broadcast = self.server.encode_broadcast(round)
        self.server.open_round(round, [Assignment(c, round) for c in clients], {round: broadcast})
        for client in reversed(clients):
            payload = self.host.train(round, client, broadcast).payload
            self.server.receive(round, client, payload)
        return self.server.aggregate(round)


def folded(record: RoundRecord) -> list[int]:
    return [client.client for client in record.folded]


def faults(record: RoundRecord) -> dict[int, str]:
    return {client.client: client.fault.kind for client in record.clients if client.fault}


def of(record: RoundRecord, client: int) -> ClientRecord:
    (found,) = [each for each in record.clients if each.client == client]
    return found


# Clients that are absent


ABSENT = {
    "late": {"federation.deadline": 5.0, "simulation.speed_spread": 1.0},
    "dropped": {"simulation.dropout": 0.3},
    "abandoned": {"simulation.dropout": 0.4, "federation.min_updates": 3},
    "over-selected": {"federation.over_selection": 0.5, "simulation.speed_spread": 1.0},
}


@pytest.mark.parametrize("kind", ABSENT)
def test_the_state_is_that_of_a_federation_of_those_in_time(
    tiny_experiment: Experiment, kind: str
) -> None:
    experiment = tiny_experiment.with_values(
        ABSENT[kind] | {"federation.rounds": 5, "evaluation.every": 5, "downlink.bits": 32}
    )
    preflight.check([experiment])
    backend, hand = InProcess(experiment), ByHand(experiment)
    size = len(hand.server.encode_broadcast(1)[4])
    last = state_digest(hand.server._state)
    kinds: Counter[str] = Counter()
    for record in Federation(experiment, backend).run():
        kinds.update(faults(record).values())
        kinds.update({"in time": len(record.folded)})
        if record.folded:
            assert record.digest == hand.round(record.round, folded(record))
            assert record.digest != last
        assert record.folded or record.digest == last
        last = record.digest
        for client in record.clients:
            assert client.down == pytest.approx(size, abs=8)  # the header says the round
            assert (client.up > 0) == (client.loss is not None) == (client.fault is None)
    assert kinds[kind if kind != "over-selected" else "late"] > 0
    assert kinds["in time"] > 0


def test_who_is_late_is_who_needs_longer_than_the_deadline(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values(ABSENT["late"])
    backend = InProcess(experiment)
    schedule = Schedule(experiment, backend.examples())
    for record in Federation(experiment, backend).run():
        slow = {c.client for c in record.clients if schedule.duration(c.client) > 5.0}
        assert set(faults(record)) == slow
        assert len(record.clients) == 4
        assert record.seconds["simulated"] <= 5.0


def test_of_clients_of_one_speed_those_of_the_lowest_numbers_are_first(
    tiny_experiment: Experiment,
) -> None:
    experiment = tiny_experiment.with_values({"federation.over_selection": 0.5})
    backend, hand = InProcess(experiment), ByHand(experiment)
    for record in Federation(experiment, backend).run():
        sampled = sample_cohort(
            experiment.federation, experiment.seed, record.round, backend.examples(), 6
        )
        assert [client.client for client in record.clients] == list(sampled)
        assert folded(record) == list(sampled[:4])
        assert faults(record) == dict.fromkeys(sampled[4:], "late")
        assert record.digest == hand.round(record.round, sampled[:4])
        assert record.seconds["simulated"] == 4.0


def test_an_abandoned_round_leaves_the_state_and_what_clients_keep_and_is_counted(
    tiny_experiment: Experiment,
) -> None:
    values = {"uplink.bits": 4, "uplink.error_feedback": True, "federation.rounds": 8}
    experiment = tiny_experiment.with_values(
        values | ABSENT["abandoned"] | {"federation.local_steps": 1, "evaluation.every": 8}
    )
    federation = Federation(experiment, InProcess(experiment))
    seen, digest, kept = set(), None, {}
    for record in federation.run():
        empty = not record.folded
        seen.add(empty)
        memories = dict(federation.snapshot().memories)
        if empty:
            assert set(faults(record).values()) <= {"abandoned", "dropped"}
            assert "abandoned" in faults(record).values()
            reasons = {c.fault.reason for c in record.clients if c.fault}
            assert any("federation.min_updates = 3" in reason for reason in reasons)
            assert digest is None or record.digest == digest
            assert memories == kept
            assert all(client.down > 0 for client in record.clients)
            metrics = round_metrics(federation.history)
            assert metrics["clients/abandoned"] + metrics["clients/dropped"] == 4
            assert "train/loss" not in metrics
        else:
            assert len(record.folded) >= 3
            assert record.digest != digest
        digest, kept = record.digest, memories
    assert seen == {True, False}


# FedBuff


@pytest.mark.slow
def test_fedbuff_repeats_and_goes_on_after_any_round_with_the_same_bits(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    experiment = tiny_experiment.with_values(FEDBUFF | {"simulation.dropout": 0.2})
    preflight.check([experiment])
    whole, restored = interrupted(experiment, tmp_path, after=1)
    assert numbers(restored.history) == numbers(whole.history) == numbers(run(experiment))
    federation = Federation(experiment, InProcess(experiment))
    folders = []
    for record in federation.run():
        folders.append(tmp_path / "rounds" / str(record.round))
        folders[-1].mkdir(parents=True)
        checkpoint.save(federation, folders[-1])
    assert any((folder / checkpoint.BROADCASTS).exists() for folder in folders)
    backend = InProcess(experiment)
    for folder in folders[:-1]:
        other = Federation(experiment, backend)
        checkpoint.restore(other, folder)
        list(other.run())
        assert numbers(other.history) == numbers(whole.history)


class Keeping(InProcess):
    """Keeps every broadcast that was made."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.made: dict[int, Broadcast] = {}

        def encode(round: int, *readers: Sequence[int]) -> Broadcast:
            self.made[round] = self._server.encode_broadcast(round, *readers)
            return self.made[round]

        self.encode_broadcast = encode


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_a_late_update_in_fedbuff_is_a_shorter_step_from_where_it_started(
    tiny_experiment: Experiment, power: float
) -> None:
    """FedBuff, algorithm 1 (Nguyen et al., arXiv 2106.06639), with n_i for its equal weights:
    S + sum n_i s(tau_i) u_i / sum n_i, s(tau) = 1 / (1 + tau)^power. Tolerance: fp32's."""
    values = {"federation.staleness_power": power, "evaluation.every": 6}
    experiment = tiny_experiment.with_values(FEDBUFF | values)
    backend, host, encoder = Keeping(experiment), ClientHost(experiment), Server(experiment)
    counts = backend.examples()
    state = {n: t.double() for n, t in backend._server._state.items()}
    federation = Federation(experiment, backend)
    ages: Counter[int] = Counter()
    for record in federation.run():
        assert len(record.folded) == 2
        weights = [counts[client.client] for client in record.folded]
        for client, weight in zip(record.folded, weights, strict=True):
            age = client.staleness
            ages[age] += 1
            started = record.round - age
            update = host.train(started, client.client, backend.made[started])
            assert client.down == len(backend.made[started][4])
            assert (client.up, client.loss) == (len(update.payload), update.loss)
            for name, tensor in safetensors.torch.load(update.payload).items():
                share = weight / sum(weights) * (1 + age) ** -power
                state[name] = state[name] + share * tensor.double()
        adapter = dict(federation.snapshot().adapter or {})
        found = safetensors.torch.load(adapter[ADAPTER_STATE])
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-6)
        metrics = round_metrics(federation.history)
        mean = sum(client.staleness for client in record.folded) / 2
        assert metrics["clients/staleness"] == mean
        encoder.restore(adapter)  # what starts after this round starts from its state
        if record.round < experiment.federation.rounds:
            following = encoder.encode_broadcast(record.round + 1)
            assert backend.made[record.round + 1] == following
    assert ages[0] > 0
    assert max(ages) > 1


def test_a_client_that_drops_out_and_starts_again_downloads_the_emulator_once(
    tiny_experiment: Experiment,
) -> None:
    """Two clients, who drop out time and again, also twice in one round."""
    values = {
        "adapter.kind": "prompt",
        "adapter.tokens": 4,
        "emulator.kind": "shared-layer",
        "emulator.steps": 1,
        "server.examples": 40,
        "federation.mode": "fedbuff",
        "federation.clients": 2,
        "federation.client_fraction": 1.0,
        "federation.buffer": 2,
        "federation.local_steps": 1,
        "simulation.dropout": 0.8,
        "evaluation.every": 3,
    }
    experiment = tiny_experiment.with_values(values)
    backend = Keeping(experiment)
    history = list(Federation(experiment, backend).run())
    twice = [Counter(c.client for c in r.clients).most_common(1)[0][1] for r in history]
    assert twice[0] > 1
    records = [(r.round - c.staleness, c) for r in history for c in r.clients]
    messages = sum(len(backend.made[started][4]) for started, _ in records)
    assert sum(c.down for _, c in records) == messages + 2 * backend.download()


# The evaluation of a round goes on while the next one trains


class Eager(InProcess):
    """Trains and folds the whole cohort as soon as it is told, as actors do."""

    def train(self, *arguments: Any) -> Iterator[ClientReport]:
        return iter(list(super().train(*arguments)))


@pytest.mark.parametrize("kind", [InProcess, Eager])
@pytest.mark.parametrize("every", [1, 2])
def test_what_is_measured_and_kept_of_a_round_is_its_own_state(
    tiny_experiment: Experiment, tmp_path: Path, kind: type[InProcess], every: int
) -> None:
    values = {"evaluation.every": every, "adversary.watch": []}  # the leak is in test_watch
    experiment = tiny_experiment.with_values(values)
    federation, hand = Federation(experiment, kind(experiment)), ByHand(experiment)
    other, strongest = Server(experiment), federation._strongest
    for record in federation.run():
        assert record.digest == hand.round(record.round, folded(record))
        following = hand.server.encode_broadcast(record.round + 1)
        *client, _ = hand.host.evaluate(record.round + 1, following, None)
        expected = Evaluation(hand.server.evaluate(), *client)
        due = record.round % every == 0 or record.round == 3
        assert record.evaluation == (expected if due else None)

        folder = tmp_path / str(record.round)
        folder.mkdir()
        checkpoint.save(federation, folder)
        assert checkpoint.read_history(folder) == federation.history
        assert [each.round for each in federation.history] == list(range(1, record.round + 1))
        files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
        assert other.restore(files) == record.digest
        assert files == hand.server.adapter()
    assert strongest == hand.host._text.strongest


# A server that is lost


class Fragile:
    """A `Backend` whose server is lost in chosen calls; each report of a round is one, too.

    Args:
        experiment: What to run.
        lost: The numbers of those calls, from 1.
    """

    def __init__(self, experiment: Experiment, lost: Sequence[int]) -> None:
        self._experiment, self._lost = experiment, set(lost)
        self.calls: list[str] = []
        self._inner: InProcess | None = InProcess(experiment)

    def _call(self, name: str) -> InProcess:
        self.calls.append(name)
        if len(self.calls) in self._lost:
            self._inner = None
        if self._inner is None:
            raise ServerLost(f"in call {len(self.calls)}, {name}")
        return self._inner

    def __getattr__(self, name: str) -> Any:
        return partial(self._ask, name)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return getattr(self._call(name), name)(*arguments)

    def examples(self) -> Sequence[int]:
        return (self._inner or InProcess(self._experiment)).examples()

    def download(self) -> int:
        return 0

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        maskings: Mapping[int, Masking] | None = None,
    ) -> Iterator[ClientReport]:
        reports = self._call("train").train(round, cohort, broadcasts, maskings)

        def checked() -> Iterator[ClientReport]:
            for report in reports:
                self._call("report")
                yield report

        return checked()

    def evaluate(self, *arguments: Any) -> Any:
        wait = self._call("evaluate").evaluate(*arguments)

        def waited() -> Any:
            self._call("evaluation")
            return wait()

        return waited

    def renew_server(self) -> None:
        self._inner = InProcess(self._experiment)
        self._call("renew_server")


CALLS = 18
"""Two rounds of two clients: each with a broadcast, a training and its reports, its end, an
evaluation and its result, the adapter; the final model; and the broadcast that the last evaluation
reads."""


@pytest.fixture(scope="module")
def short(tiny_experiment: Experiment) -> Experiment:
    """With clients that keep something."""
    values = {"federation.cohort": 2, "federation.client_fraction": None, "federation.rounds": 2}
    more = {"uplink.bits": 4, "uplink.error_feedback": True, "federation.local_steps": 1}
    return tiny_experiment.with_values(values | more)


@pytest.fixture(scope="module")
def expected(short: Experiment) -> list[dict[str, object]]:
    return numbers(run(short))


def lossy(experiment: Experiment, *lost: int) -> tuple[list[RoundRecord], Fragile]:
    backend = Fragile(experiment, lost)
    return list(finished_rounds(Federation(experiment, backend))), backend


def test_the_calls_of_a_run_are_those_counted_by_hand(
    short: Experiment, expected: list[dict[str, object]]
) -> None:
    history, backend = lossy(short)
    assert numbers(history) == expected
    fold = ["train", "report", "report", "aggregate"]
    measure = ["encode_broadcast", "evaluate", "evaluation", "adapter"]
    second = [*measure[:2], fold[0], *measure[2:], *fold[1:]]
    assert backend.calls == ["encode_broadcast", *fold, *second, "finish", *measure]
    assert len(backend.calls) == CALLS


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_a_server_lost_in_any_call_changes_no_bit(
    short: Experiment, expected: list[dict[str, object]], call: int
) -> None:
    history, backend = lossy(short, call)
    assert [record.round for record in history] == [1, 2]
    assert numbers(history) == expected
    assert backend.calls.count("renew_server") == 1


def test_a_server_lost_while_it_is_made_anew_is_made_once_more(
    short: Experiment, expected: list[dict[str, object]]
) -> None:
    """In the last call, then in each of the two that bring the state back."""
    history, backend = lossy(short, CALLS, CALLS + 1, CALLS + 3)
    assert backend.calls[CALLS:][:4] == ["renew_server", "renew_server", "restore", "renew_server"]
    assert numbers(history) == expected


def test_a_server_that_is_lost_time_and_again_ends_the_run(short: Experiment) -> None:
    backend = Fragile(short, range(1, 99, 2))
    with pytest.raises(ServerLost, match="in call 7, encode_broadcast"):
        list(finished_rounds(Federation(short, backend)))
    assert backend.calls.count("renew_server") == LOSSES


def test_a_fedbuff_server_that_is_lost_gets_its_broadcasts_back(
    tiny_experiment: Experiment,
) -> None:
    experiment = tiny_experiment.with_values(FEDBUFF | {"federation.rounds": 4})
    history, _ = lossy(experiment, 20, 32)
    assert numbers(history) == numbers(run(experiment))


# Updates that cannot be used


class Poisoned(InProcess):
    """The last number of an update becomes NaN on its way to the server.

    Args:
        experiment: What to run.
        round: In which round.
        client: Whose update.
    """

    def __init__(self, experiment: Experiment, round: int, client: int) -> None:
        super().__init__(experiment)
        verdict = self._server.verdict

        def poisoned(r: int, c: int, payload: bytes) -> str | None:
            nan = torch.tensor([math.nan]).numpy().tobytes()
            return verdict(r, c, payload[:-4] + nan if (r, c) == (round, client) else payload)

        self._server.verdict = poisoned  # type: ignore[method-assign]


def diverging(experiment: Experiment, *victims: int) -> InProcess:
    """With clients whose parameters become NaN."""
    backend = InProcess(experiment)
    host, train = backend._host, backend._host._train_client

    def diverge(round: int, client: int, rules: Any) -> float:
        loss = train(round, client, rules)
        if client in victims:
            for parameter in trainable(host._model).values():
                parameter.data.fill_(math.nan)
        return loss

    host._train_client = diverge  # type: ignore[method-assign]
    return backend


@pytest.mark.parametrize("how", ["poisoned", "diverged"])
def test_the_round_goes_on_without_an_update_that_cannot_be_used(
    tiny_experiment: Experiment, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = tiny_experiment.with_values({"federation.rounds": 1})
    sampled = sample_cohort(experiment.federation, experiment.seed, 1)
    victim, *others = sampled
    backend = {"poisoned": lambda: Poisoned(experiment, 1, victim),
               "diverged": lambda: diverging(experiment, victim)}[how]()  # fmt: skip
    federation = Federation(experiment, backend)
    with caplog.at_level(logging.WARNING):
        (record,) = federation.run()
    assert folded(record) == others
    fault = of(record, victim).fault
    assert fault is not None
    assert fault.kind == "refused"
    words = {"poisoned": f"update of client {victim} refused", "diverged": "diverged (client.lr ="}
    assert words[how] in fault.reason
    assert f"round 1: client {victim} refused: {fault.reason}" in caplog.text
    metrics = round_metrics(federation.history)
    assert (metrics["clients/refused"], metrics["clients/folded"]) == (1, 3)
    assert (of(record, victim).up > 0) == (how == "poisoned")  # what travelled is counted
    assert of(record, victim).down > 0
    assert record.digest == ByHand(experiment).round(1, others)
    assert math.isfinite(metrics["train/loss"])


def test_who_is_refused_keeps_what_it_had_before(tiny_experiment: Experiment) -> None:
    """Error feedback: what was left of an update that counted for nothing is not owed."""
    values = {"uplink.bits": "bf16", "uplink.error_feedback": True}
    experiment = tiny_experiment.with_values(
        values | {"federation.client_fraction": 1.0, "federation.rounds": 2}
    )
    for round in (1, 2):
        backend = Poisoned(experiment, round, 3)
        federation, kept = Federation(experiment, backend), []
        for _ in federation.run():
            kept.append(dict(federation.snapshot().memories))
        assert faults(federation.history[round - 1]) == {3: "refused"}
        assert set(kept[1]) == set(range(8))
        if round == 1:
            assert set(kept[0]) == set(range(8)) - {3}
        else:
            changed = {client for client in range(8) if kept[0][client] != kept[1][client]}
            assert changed == set(range(8)) - {3}


def test_a_refused_update_may_leave_too_few(tiny_experiment: Experiment) -> None:
    values = {"federation.min_updates": 4, "federation.rounds": 1}
    experiment = tiny_experiment.with_values(values)
    victim, *others = sample_cohort(experiment.federation, experiment.seed, 1)
    (record,) = Federation(experiment, Poisoned(experiment, 1, victim)).run()
    assert faults(record) == {victim: "refused"} | dict.fromkeys(others, "abandoned")
    assert record.digest == state_digest(Server(experiment)._state)


def test_if_no_update_can_be_used_the_run_ends_and_says_why(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"server.max_update_norm": 1e-9})
    with pytest.raises(MessageError, match=r"^round 1: no update could be used: .* norm is "):
        run(experiment)
    with pytest.raises(MessageError, match=r"round 1: no update could be used: .* diverged"):
        list(Federation(tiny_experiment, diverging(tiny_experiment, *range(8))).run())


# What is reported of it


def test_who_took_part_is_in_the_metrics_and_the_result(tiny_experiment: Experiment) -> None:
    values = {"federation.deadline": 4.0, "simulation.speed_spread": 1.0}
    experiment = tiny_experiment.with_values(values | {"simulation.dropout": 0.3})
    backend = InProcess(experiment)
    federation = Federation(experiment, backend)
    kinds: Counter[str] = Counter()
    for record in federation.run():
        metrics = round_metrics(federation.history)
        found = Counter(faults(record).values())
        kinds += found
        for kind in ("late", "dropped", "failed", "refused", "abandoned"):
            assert metrics[f"clients/{kind}"] == found[kind]
        assert metrics["clients/folded"] == len(record.folded) == 4 - found.total()
        assert 0 < metrics["seconds/simulated"] <= 4.0
        assert metrics.keys() <= set(metric_names(experiment))
    assert min(kinds["late"], kinds["dropped"]) > 0
    outcome = result(experiment, federation.history, backend.measure_floor())
    for record, row in zip(
        federation.history, json.loads(to_json(outcome))["history"], strict=True
    ):
        assert row["seconds"]["simulated"] == record.seconds["simulated"]
        shown = {each["client"]: (each["fault"] or {}).get("kind") for each in row["clients"]}
        assert shown == dict.fromkeys(folded(record)) | faults(record)


def test_one_refused_client_ends_a_run_of_rounds_of_one_only_time_and_again(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hostile client must not stop everyone; a run in which nothing ever works must say so."""
    values = {"federation.cohort": 1, "federation.client_fraction": None, "federation.rounds": 6}
    experiment = tiny_experiment.with_values(values)
    backend = InProcess(experiment)
    verdict, refused = backend._server.verdict, [2, 4, 5, 6]

    def judged(round: int, client: int, payload: bytes) -> str | None:
        return "poisoned" if round in refused else verdict(round, client, payload)

    monkeypatch.setattr(backend._server, "verdict", judged)
    federation = Federation(experiment, backend)
    with pytest.raises(MessageError, match="round 6: no update could be used: poisoned"):
        list(federation.run())
    assert [len(record.folded) for record in federation.history] == [1, 0, 1, 0, 0]
    first, second, *_ = federation.history
    assert second.digest == first.digest
