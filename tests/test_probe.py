"""The command that probes the updates of a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from fedlpp_ray import probe, train
from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.recomputed import MOST, Recomputed, all_sent, choose
from fedlpp_ray.federation.records import ClientRecord, ClientUpdate, Fault, RoundRecord
from fedlpp_ray.federation.wire import Broadcast

DP = {"dp.clip": 0.5, "dp.noise": "clients", "server.weighting": "uniform"}


@pytest.fixture(scope="module")
def run(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    experiment = tiny_experiment.with_values({"downlink.bits": 2})
    (folder / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    output = ["--output", str(folder / "run"), "--in-process"]
    assert train.main([str(folder / "x.yaml"), *output]) == 0
    return folder / "run"


def records(run: Path) -> list[RoundRecord]:
    outcome = json.loads((run / "result.json").read_text())
    return [RoundRecord.from_dict(each) for each in outcome["history"]]


def test_a_finished_runs_updates_are_made_again_and_probed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert probe.main([str(run), "--tracking-uri", store]) == 0
    report = json.loads((run / "probes.json").read_text())
    sent = [(x.round, x.client) for x in all_sent(records(run))]
    assert [(x["round"], x["client"]) for x in report["updates"]] == sent
    assert all(each["loss"]["same"] for each in report["updates"])
    for each in report["updates"]:
        assert set(each["membership"]) == {"loss", "reference", "reference_base"}
        assert each["refused"]["inversion"].startswith("federation.local_steps: of ")
    rounds = [(x["round"], x["score"]) for x in report["pooled"] if x["score"] == "loss"]
    assert rounds == [(1, "loss"), (2, "loss"), (3, "loss"), (None, "loss")]
    members = [x["membership"]["loss"]["members"] for x in report["updates"]]
    whole = next(x for x in report["pooled"] if x["round"] is None and x["score"] == "reference")
    assert whole["members"] == sum(members)
    assert "honest but curious" in report["threat"]
    shown = capsys.readouterr()
    assert "no dp" in shown.out
    together = ", ".join(str(x.client) for x in all_sent(records(run)) if x.round == 1)
    assert f"round 1, client {together}: federation.local_steps: of" in shown.out
    assert f"{len(sent)} made again, each with the loss" in shown.err
    client = MlflowClient(store)
    (logged,) = client.search_runs([client.get_experiment_by_name("train").experiment_id])
    assert logged.data.metrics["probe/membership/all/reference/auc"] == whole["auc"]
    points = client.get_metric_history(logged.info.run_id, "probe/membership/loss/auc")
    assert [point.step for point in points] == [1, 2, 3]


def test_only_what_was_asked_for_is_probed(run: Path, tmp_path: Path) -> None:
    client, out = records(run)[1].folded[0].client, tmp_path / "out.json"
    options = ["--rounds", "2", "--clients", str(client), "--json", str(out)]
    assert probe.main([str(run), *options]) == 0
    (update,) = json.loads(out.read_text())["updates"]
    assert (update["round"], update["client"]) == (2, client)


def test_one_step_is_inverted_and_noise_is_named(
    tiny_experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"federation.local_steps": 1, "federation.rounds": 1, "client.batch_size": 1}
    values |= {"federation.client_fraction": 0.25}
    experiment = tiny_experiment.with_values(DP | values)
    (tmp_path / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    run = tmp_path / "run"
    assert train.main([str(tmp_path / "x.yaml"), "--output", str(run), "--in-process"]) == 0
    assert probe.main([str(run)]) == 0
    report = json.loads((run / "probes.json").read_text())
    assert "u has its client's share of the noise" in report["threat"]
    for each in report["updates"]:
        assert each["loss"]["same"]
        assert set(each["inversion"]) == {"A", "B"}
        assert each["refused"] == {}
    assert "B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "4"], "--rounds 4: the run has rounds 1 to 3"),
        (["--rounds", "a"], "--rounds a: allowed: whole numbers, such as 1,6,12"),
        (["--clients", "99"], "--clients 99: not sampled in any round; it has updates in none"),
        (["--json", "no/where.json"], "--json no/where.json: cannot be written"),
        (["--tracking-uri", "nonsense://x"], "MLflow at 'nonsense://x'"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_computed(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert probe.main([str(run), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "preparing" not in shown


def test_runs_without_updates_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe.main([str(tmp_path)]) == 2
    assert "has no result.json" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    shutil.copy(run / "result.json", tmp_path / "a")
    assert probe.main([str(tmp_path / "a")]) == 2
    assert "has no broadcasts" in capsys.readouterr().err
    outcome = json.loads((run / "result.json").read_text())
    for key, value, message in (
        ("method", "centralised", "method 'centralised' has no updates"),
        ("client", {"num_workers": 2}, "client.num_workers: an update of several ranks"),
        ("secure", {"threshold": 3}, "secure.threshold = 3: the server saw the sum of a round's"),
    ):
        old = outcome["config"][key]
        changed = {**old, **value} if isinstance(value, dict) else value
        config = outcome["config"] | {key: changed}
        (tmp_path / "a" / "result.json").write_text(json.dumps(outcome | {"config": config}))
        assert probe.main([str(tmp_path / "a")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        {"uplink.bits": 4, "client.base_bits": 4, "downlink.every": 2, "downlink.rotate": "round"},
        {"uplink.bits": 2, "uplink.error_feedback": True},
        {"client.scaffold": True, "client.optimizer": "sgd", "client.momentum": 0.0},
        {"server.aggregation": "fedsa-lora", "evaluation.server": False},
        {"dp.clip": 0.5, "dp.adaptive": True, "dp.noise": "clients", "dp.count_noise": 3.0}
        | {"server.weighting": "uniform"},
        {"federation.mode": "fedbuff", "federation.buffer": 2, "simulation.speed_spread": 1.0},
    ],
    ids=["bits", "error feedback", "scaffold", "personal", "dp", "fedbuff"],
)
def test_an_update_made_again_is_the_one_that_was_sent_bit_for_bit(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch, values: dict[str, object]
) -> None:
    experiment = tiny_experiment.with_values(
        {"federation.local_steps": 2, "evaluation.every": 3, "adversary.watch": []} | values
    )
    payloads: dict[tuple[int, int], bytes] = {}
    train_one = ClientHost.train

    def recorded(host: ClientHost, round: int, client: int, *given: Any) -> ClientUpdate:
        update = train_one(host, round, client, *given)
        payloads[round, client] = update.payload
        return update

    monkeypatch.setattr(ClientHost, "train", recorded)
    broadcasts: dict[int, Broadcast] = {}
    federation = Federation(experiment, InProcess(experiment), broadcasts.__setitem__)
    list(federation.run())
    monkeypatch.undo()
    again = Recomputed(experiment, broadcasts, federation.history, None)
    sent = all_sent(federation.history)
    assert len({each.client for each in sent}) < len(sent)  # some take part twice
    for each in sent[::-1]:
        update = again.update(each)
        assert update.payload == payloads[each.started, each.client]
        assert each.is_that(update)


def history(*rounds: dict[int, Fault | None]) -> list[RoundRecord]:
    return [
        RoundRecord(
            number,
            None,
            tuple(ClientRecord(c, 0, 1, 0.5, fault=fault) for c, fault in clients.items()),
            {},
            "",
        )
        for number, clients in enumerate(rounds, 1)
    ]


def test_which_updates_are_chosen_and_why_others_are_not() -> None:
    late = Fault("late", "too slow")
    crowd = dict.fromkeys(range(10, 30))
    past = history({1: None, 2: late}, {2: None}, {1: late}, crowd, {3: None}, {1: None})
    rounds = lambda *given: [(x.round, x.client) for x in choose(past, *given)]  # noqa: E731
    assert rounds(None, None) == [(1, 1), *((4, c) for c in range(10, 10 + MOST)), (6, 1)]
    assert rounds(None, [1]) == [(1, 1), (6, 1)]
    assert rounds(None, [2, 1]) == [(1, 1), (2, 2), (6, 1)]  # of each its own
    assert rounds(None, [10, 3]) == [(4, 10), (5, 3)]
    assert rounds([4], [29]) == [(4, 29)]
    with pytest.raises(Exception, match="no update in round 1: late, too slow"):
        choose(past, [1], [2])
    with pytest.raises(Exception, match="--rounds 3: no update was folded in it"):
        choose(past, [3], None)
    with pytest.raises(Exception, match="not sampled in 5; it has updates in rounds 2"):
        choose(past, [5], [2])
