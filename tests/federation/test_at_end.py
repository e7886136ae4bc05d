"""The ladder at the end of a run: the numbers of the command, and what a restart keeps for it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from fedlpp_ray import attack, train
from fedlpp_ray.config import ConfigError, Experiment, dump_experiment, fingerprint
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, Floor, RoundRecord, checkpoint, preflight
from fedlpp_ray.federation.attacked import Attacked, check_at_end
from fedlpp_ray.federation.attacked import attack as attack_run
from fedlpp_ray.federation.in_process import InProcess, in_process
from fedlpp_ray.federation.ladder import Ladder, Outcome
from fedlpp_ray.federation.records import Evaluation
from fedlpp_ray.federation.results import result
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy.attacks import ATTACKS, find_attacks
from fedlpp_ray.tasks import load_task
from fedlpp_ray.tracking.leak import save_watched
from fedlpp_ray.tracking.metrics import (
    final_metrics,
    metric_names,
    reported,
    round_metrics,
    threats,
)
from tests import tiny

ASKED = ["last-broadcast", "mean-products", "pooled-updates", "tuned"]


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment) -> Experiment:
    values = {"downlink.bits": 2, "client.base_bits": 4, "federation.local_steps": 1}
    values |= {"federation.rounds": 2, "federation.cohort": 2, "federation.client_fraction": None}
    attacked = {"adversary.at_end": ASKED, "adversary.colluders": 2, "adversary.max_looks": 1}
    return tiny_experiment.with_values(values | attacked)


def without_intervals(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_intervals(x) for k, x in value.items() if k != "interval"}
    return [without_intervals(x) for x in value] if isinstance(value, list) else value


def test_a_run_that_attacks_itself_has_the_numbers_of_the_command(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    run = tmp_path / "run"
    assert train.main([str(tmp_path / "x.yaml"), "--output", str(run), "--in-process"]) == 0
    shown = capsys.readouterr().err
    outcome = json.loads((run / "result.json").read_text())
    assert attack.main([str(run), "--attacks", ",".join(ASKED)]) == 0
    report = json.loads((run / "attacks.json").read_text())
    assert outcome["ladder"] == without_intervals(report)
    bases = {each["base"] for each in outcome["ladder"]["attacks"]}
    assert bases == {"client", "public"}

    utilities = {each["name"]: each["metrics"]["utility"] for each in report["attacks"]}
    assert outcome["protection"]["strongest"][1] >= max(utilities.values())
    assert outcome["protection"]["floor"][1] == report["protection"]["floor"][1]
    seconds = outcome["seconds"]
    assert seconds["leak"] == sum(record["seconds"]["leak"] for record in outcome["history"])
    assert seconds["leak_share"] == pytest.approx(seconds["leak"] / seconds["run"])
    assert 0 < seconds["leak"] < seconds["run"]
    assert f"{seconds['leak_share']:.1%} of the run's" in shown
    assert "ladder    strongest" in shown
    threat = f"adversary the strongest client.*; and at the end {re.escape(report['threat'])}"
    assert re.fullmatch(threat, outcome["threat"])
    assert f"threat    {outcome['threat']}" in shown
    assert threats(outcome) == {"threat": outcome["threat"], "attack.threat": report["threat"]}

    assert (run / "leak_curve.png").read_bytes().startswith(b"\x89PNG")
    found = final_metrics(outcome)
    assert found["attack/strongest"] == max(utilities.values())
    assert found["attack/tuned"] == max(utilities["tuned"], utilities["tuned on W0"])


def test_a_restart_keeps_all_that_is_attacked_at_the_end(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Where nothing else does; else a checkpoint has the window of what is watched."""
    values = {"adversary.watch_window": 1, "adversary.at_end": ["mean-factors"]}
    experiment = experiment.with_values(values | {"federation.rounds": 3})
    sent: dict[int, Broadcast] = {}
    backend = InProcess(experiment)
    whole = Federation(experiment, backend, sent.__setitem__)
    for record in whole.run():
        if record.round == 2:
            assert set(whole.snapshot().broadcasts) == {2}

    first = Federation(experiment, InProcess(experiment))
    next(rounds := first.run())
    next(rounds)
    checkpoint.save(first, tmp_path)
    restored = Federation(experiment, backend)
    checkpoint.restore(restored, tmp_path)
    list(restored.run())
    found = restored.attack()
    assert found is not None
    assert whole.attack(lambda: sent) == replace(found, seconds=ANY)
    expected = list(Ladder(experiment, sent, whole.history).run(find_attacks(["mean-factors"])))
    assert list(found.outcomes) == expected
    assert [each.broadcasts for each in found.outcomes] == [4, 4]
    assert f"{len(sent)} broadcasts" in found.threat


def test_a_search_may_ask_for_what_the_ladder_came_to(experiment: Experiment) -> None:
    backend = InProcess(experiment)
    federation = Federation(experiment, backend)
    history = list(federation.run())
    outcome = result(experiment, history, backend.measure_floor(), None, federation.attack())
    found = round_metrics(history) | final_metrics(outcome)
    assert set(found) == set(metric_names(experiment))
    assert reported(found) == found
    assert {f"attack/{name}" for name in (*ASKED, "strongest")} < set(found)
    everything = metric_names(experiment.with_values({"adversary.at_end": "all"}))
    able = {n for n, x in ATTACKS.items() if not x.needs & {"auxiliary", "masks", "average"}}
    assert {x for x in everything if x.startswith("attack/")} == {
        f"attack/{name}" for name in (*able, "strongest")
    }


def outcome_of(name: str, utility: float) -> Outcome:
    return Outcome(name, "client", "trained", 2, 1, {"utility": utility})


def ended(attacks: Sequence[Outcome], floor: dict[str, float]) -> dict[str, Any]:
    evaluation = Evaluation({"utility": 0.9}, {"utility": 0.5}, {"utility": 0.6})
    history = [RoundRecord(1, evaluation, (), {"total": 2.0, "leak": 0.5}, "")]
    own = Floor({"utility": 0.1}, {"utility": 0.3}, 0, 8)
    ladder = Attacked("somebody", tuple(attacks), floor, 3.0)
    return result(Experiment(), history, own, None, ladder)


def test_protection_counts_what_was_attacked_at_the_end() -> None:
    """(.9 - .8) / (.9 - .4), by hand; and of the ladder alone, per attack."""
    outcome = ended([outcome_of("tuned", 0.8), outcome_of("trend", 0.4)], {"tuned alone": 0.4})
    assert outcome["protection"]["value"] == pytest.approx(0.2)
    assert outcome["protection"]["strongest"] == ("tuned", 0.8)
    assert outcome["protection"]["floor"] == ("tuned alone", 0.4)
    protections = [each["protection"] for each in outcome["ladder"]["attacks"]]
    assert protections == pytest.approx([0.2, 1.0])
    assert outcome["seconds"] == {"run": 2.0, "leak": 0.5, "leak_share": 0.25, "ladder": 3.0}
    weaker = ended([outcome_of("tuned", 0.55)], {})
    assert weaker["protection"]["strongest"] == ("client_after of round 1", 0.6)
    assert weaker["protection"]["value"] == pytest.approx(0.5)


def test_an_adversary_that_received_nothing_costs_the_attacks_and_not_the_run(
    experiment: Experiment,
) -> None:
    sampled = experiment.with_values({"adversary.rounds": "sampled", "adversary.colluders": 1})
    found = attack_run(sampled, {1: {}}, [])
    assert not found.outcomes
    assert "received no broadcast" in found.threat
    outcome = ended([], {})
    assert outcome["protection"]["strongest"] == ("client_after of round 1", 0.6)
    assert "attack/strongest" not in final_metrics(outcome)


def test_auxiliary_text_of_which_nothing_is_left_is_refused_before_and_costs_the_attacks_alone(
    experiment: Experiment, tiny_csv: Path, tmp_path: Path
) -> None:
    with tiny_csv.open() as file:
        rows = [{"text": row["text"]} for row in csv.DictReader(file)]
    held_out = {row["text"] for row in rows} - set(load_task(experiment.task).train.texts)
    (empty := tmp_path / "empty.jsonl").touch()
    known = tiny.write_csv(tmp_path / "known.csv", [{"text": text} for text in held_out])
    some = tiny.write_csv(tmp_path / "some.csv", rows)
    for path, message in (
        (empty, r"adversary\.auxiliary: .*has no rows"),
        (known, r"adversary\.auxiliary: each text of .* is held out"),
        (tmp_path / "none.csv", "no such file"),
    ):
        asked = experiment.with_values({"adversary.auxiliary": str(path)})
        with pytest.raises(UserError, match=message):
            preflight.check([asked])
        assert attack_run(asked, {1: {}}, []).threat.startswith("no attack: ")
        preflight.check([asked.with_values({"adversary.at_end": []})])
    preflight.check([experiment.with_values({"adversary.auxiliary": str(some)})])


def test_nothing_is_attacked_that_nobody_asks_for_or_that_leaves_no_model(
    tiny_experiment: Experiment,
) -> None:
    asked = tiny_experiment.with_values({"adversary.at_end": "all"})
    assert fingerprint(asked) == fingerprint(tiny_experiment)
    own = {"server.aggregation": "fedsa-lora", "evaluation.server": False}
    alone = asked.with_values({"method": "centralised"})
    for other in (tiny_experiment, asked.with_values(own), alone):
        assert Federation(other, in_process(other)).attack() is None
        assert not any(name.startswith("attack/") for name in metric_names(other))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"adversary.at_end": ["trend", "x"]},
            r"adversary\.at_end: attack 'x' is not one of: last",
        ),
        ({"adversary.colluders": 9}, "colluders = 9 is more than federation.clients = 8"),
        ({"client.zero.stage": 3}, r"adversary\.at_end with client\.zero\.stage = 3"),
        ({"server.zero.stage": 3}, r"adversary\.at_end with server\.zero\.stage = 3"),
    ],
)
def test_what_could_not_be_attacked_is_refused_before(
    experiment: Experiment, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_at_end(experiment.with_values(values))
    check_at_end(experiment.with_values(values | {"adversary.at_end": []}))


def test_a_run_that_watches_nothing_has_no_curve(tmp_path: Path) -> None:
    outcome = json.loads(json.dumps(ended([], {})))
    save_watched(outcome, "accuracy", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    outcome["history"][0]["leak"] = {"trend": {"utility": None}}  # it has diverged
    save_watched(outcome, "accuracy", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
