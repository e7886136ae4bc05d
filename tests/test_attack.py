"""The command that attacks a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from fedlpp_ray import attack, probe, train
from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.checkpoint import trained
from fedlpp_ray.federation.intervals import over_seeds, protection_intervals
from fedlpp_ray.federation.ladder import Ladder, Outcome
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.privacy import Interval, Scores, bootstrap_protection
from fedlpp_ray.privacy.attacks import find_attacks
from fedlpp_ray.storage import DamagedError, RunFolder
from fedlpp_ray.training import Scored


@pytest.fixture(scope="module")
def run(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    experiment = tiny_experiment.with_values({"downlink.bits": 2})
    (folder / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    output = ["--output", str(folder / "run"), "--in-process"]
    assert train.main([str(folder / "x.yaml"), *output]) == 0
    return folder / "run"


@pytest.fixture
def able(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy whose server knows all answers, so that its protection is defined."""
    path = tmp_path / "able" / "result.json"
    shutil.copytree(run, path.parent, ignore=shutil.ignore_patterns("run-id"))
    outcome = json.loads(path.read_text())
    outcome["history"][-1]["server"]["utility"] = 1.0
    path.write_text(json.dumps(outcome))
    compared = Ladder.compared

    def knowing(ladder: Ladder, adapter: Mapping[str, bytes]) -> tuple[Scored, dict[str, Scored]]:
        (metrics, scores), floor = compared(ladder, adapter)
        assert scores is not None
        return (metrics, replace(scores, values=np.ones_like(scores.values))), floor

    monkeypatch.setattr(Ladder, "compared", knowing)
    return path.parent


def test_a_finished_run_is_attacked_and_protection_is_against_the_strongest(able: Path) -> None:
    assert attack.main([str(able), "adversary.max_looks=1", "adversary.colluders=2"]) == 0
    report = json.loads((able / "attacks.json").read_text())
    utilities = {each["name"]: each["metrics"]["utility"] for each in report["attacks"]}
    assert report["adversary"]["colluders"] == 2
    total = report["protection"]
    assert total["strongest"][1] == max(utilities.values())
    server = json.loads((able / "result.json").read_text())["history"][-1]["server"]["utility"]
    assert total["server"] == server == 1
    floor = total["floor"][1]
    expected = (server - max(utilities.values())) / (server - floor)
    assert total["value"] == pytest.approx(expected)
    assert set(report["levels"]) == {"broadcast", "trained"}
    assert report["left_out"].keys() == {
        *("unmasked-broadcast", "mean-final", "distilled", "distilled-mean")
    }
    assert report["left_out"]["distilled"] == "needs adversary.auxiliary"
    assert not utilities.keys() & report["left_out"].keys()


def test_the_leak_curve_is_the_strongest_attack_after_each_broadcast(
    able: Path, tmp_path: Path
) -> None:
    out, store = tmp_path / "out.json", f"sqlite:///{tmp_path / 'mlflow.db'}"
    options = ["--attacks", "last-broadcast,mean-factors,tuned", "--curve", "1"]
    assert attack.main([str(able), *options, "--json", str(out), "--tracking-uri", store]) == 0
    report = json.loads(out.read_text())
    curve = report["leak_curve"]
    assert [each["round"] for each in curve] == [0, 1, 2, 3]
    history = json.loads((able / "result.json").read_text())["history"]
    for point, record in zip(curve[1:], history, strict=True):
        assert point["utility"] >= record["client_before"]["utility"]
        if point["name"] == "last-broadcast":
            assert point["utility"] == record["client_before"]["utility"]
    assert (tmp_path / "leak_curve.png").read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(store)
    (logged,) = client.search_runs([client.get_experiment_by_name("train").experiment_id])
    points = client.get_metric_history(logged.info.run_id, "attacks/leak_curve")
    assert [(p.step, p.value) for p in points] == [(c["round"], c["utility"]) for c in curve]
    metrics, protection = logged.data.metrics, report["protection"]
    assert metrics["attacks/strongest"] == protection["strongest"][1]
    assert metrics["attacks/floor"] == protection["floor"][1]
    assert metrics["attacks/server"] == protection["server"]
    for prefix, found in (
        ("attacks", protection),
        ("attacks/trained", report["levels"]["trained"]),
    ):
        expected = {"protection": found["value"], "strongest": found["strongest"][1]}
        expected |= {f"protection_{end}": found["interval"][end] for end in ("low", "high")}
        for name, value in expected.items():
            assert metrics[f"{prefix}/{name}"] == value
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["attacks.threat"] == report["threat"]
    assert logged.data.tags["attacks.adversary.architecture"] == "known"


def test_only_what_was_asked_for_is_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert attack.main([str(run), "--attacks", "trend,interval", "--json", str(out)]) == 0
    assert [each["name"] for each in json.loads(out.read_text())["attacks"]] == [
        "trend",
        "interval",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["downlink.bits=4"], "downlink.bits: the run is over; only keys of adversary"),
        (["adversary.colluders=0"], "adversary.colluders"),
        (["adversary.colluders=99"], "adversary.colluders = 99 is more than"),
        (["--curve", "1", "--attacks", "tuned"], "none of these attacks only reads broadcasts"),
        (["--curve", "0"], "allowed: 1 and more"),
        (["--attacks", "nonsense"], "attack 'nonsense' is not one of"),
        (["--attacks", "distilled"], "--attacks: attack 'distilled' needs adversary.auxiliary"),
        (
            ["--attacks", "trend,tuned", "adversary.architecture=unknown"],
            "--attacks: attack 'tuned' needs adversary.architecture 'known'",
        ),
    ],
)
def test_wrong_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert attack.main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_servers_utility_protection_is_undefined_for_that_reason(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    outcome = json.loads(path.read_text())
    outcome["history"][-1]["server"] = None
    path.write_text(json.dumps(outcome))
    assert attack.main([str(path.parent), "--attacks", "last-broadcast", "--curve", "2"]) == 0
    report = json.loads((path.parent / "attacks.json").read_text())
    assert report["protection"]["reason"] == "the server has no model"


def test_a_folder_without_a_finished_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack.main([str(tmp_path)]) == 2
    assert "has no result.json" in capsys.readouterr().err


def test_broadcasts_are_kept_whole_and_replaced_where_a_round_came_to_another(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    folder = RunFolder(tmp_path, tiny_experiment)
    assert folder.kept() == {}
    (tmp_path / "broadcasts" / "round-000002.part").mkdir(parents=True)  # a crash left it
    folder.keep(2, {8: b"second"})
    folder.keep(1, {4: b"first", 8: b"one"})
    folder.keep(1, {4: b"first", 8: b"one"})
    folder.keep(3, {8: b""})
    assert folder.kept() == {1: {4: b"first", 8: b"one"}, 2: {8: b"second"}}
    folder.keep(1, {8: b"of the round that went on"})
    assert folder.kept()[1] == {8: b"of the round that went on"}
    (tmp_path / "broadcasts" / "round-000002" / "8.safetensors").write_bytes(b"secund")
    with pytest.raises(DamagedError, match=r"8\.safetensors"):
        folder.kept()


def test_every_protection_has_its_interval_over_the_held_out_examples(
    able: Path, tmp_path: Path
) -> None:
    out, names = tmp_path / "out.json", "last-broadcast,trend,tuned"
    assert attack.main([str(able), "--attacks", names, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert "adversary client" in report["threat"]
    assert "architecture known; has their base, no auxiliary text" in report["threat"]
    values = [(x["protection"], x["interval"]) for x in report["attacks"]]
    for each in (report["protection"], *report["levels"].values()):
        values.append((each["value"], each["interval"]))
    assert len(values) == 6
    for value, interval in values:
        assert interval["low"] <= value <= interval["high"]
        assert 0 < interval["high"] - interval["low"] < 1
        assert interval["undefined"] == 0


def test_where_the_server_is_not_above_the_floor_there_is_no_interval(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    assert attack.main([str(run), "--attacks", "last-broadcast", "--json", str(out)]) == 0
    total = json.loads(out.read_text())["protection"]
    assert "not above the floor" in total["reason"]
    assert (total["value"], total["interval"]["low"], total["interval"]["high"]) == (None,) * 3
    assert total["interval"]["undefined"] > 0.5


def test_an_interval_is_of_its_own_attacks_and_each_attack_has_its_own() -> None:
    """Of the models' answers as given: nothing is measured."""
    random = np.random.default_rng(0)

    def scores(share: float) -> Scores:
        return Scores((random.random(400) < share).astype(float), np.ones(400))

    server, floors = scores(0.9), {"base": scores(0.2), "tuned alone": scores(0.3)}
    levels = {"weak": "broadcast", "strong": "trained", "middling": "trained"}
    given = {"weak": scores(0.4), "strong": scores(0.8), "middling": scores(0.6)}
    outcomes = [
        Outcome(name, "client", levels[name], 1, 1, {"utility": x.utility}, x)
        for name, x in given.items()
    ]

    class Measured:
        def compared(self, _: object) -> tuple[Scored, dict[str, Scored]]:
            return ({}, server), {"base": ({}, floors["base"])}

    own = {"tuned alone": ({}, floors["tuned alone"])}
    ladder: Any = Measured()
    found = protection_intervals(ladder, outcomes, own, {"x": b""}, 5)

    def expected(*names: str) -> Interval:
        attacks = {name: given[name] for name in names}
        return bootstrap_protection(server, attacks, floors, {"all": names}, seed=5)["all"]

    attacks, by_level, total = found
    assert attacks == {name: expected(name) for name in given}
    assert len({each.low for each in attacks.values()}) == 3
    assert by_level == {
        "broadcast": expected("weak"),
        "trained": expected("strong", "middling"),
    }
    assert total == expected("weak", "strong", "middling")


def test_an_attacks_examples_come_to_its_utility(run: Path) -> None:
    outcome = json.loads((run / "result.json").read_text())
    experiment = Experiment.from_dict(outcome["config"])
    history = [RoundRecord.from_dict(each) for each in outcome["history"]]
    ladder = Ladder(experiment, RunFolder(run, experiment).kept(), history)
    for each in ladder.run(find_attacks(["last-broadcast", "tuned"])):
        assert each.scores is not None
        assert each.scores.utility == pytest.approx(each.utility)


def test_the_server_and_the_floor_are_measured_again_as_they_were(run: Path) -> None:
    outcome = json.loads((run / "result.json").read_text())
    experiment = Experiment.from_dict(outcome["config"])
    folder = RunFolder(run, experiment)
    history = [RoundRecord.from_dict(each) for each in outcome["history"]]
    server, floor = Ladder(experiment, folder.kept(), history).compared(trained(folder))
    assert server[0] == outcome["history"][-1]["server"]
    assert floor["base"][0] == outcome["floor"]["base"]
    assert floor["local_only"][0] == outcome["floor"]["local_only"]
    for metrics, scores in (server, *floor.values()):
        assert scores is not None
        assert scores.utility == pytest.approx(metrics["utility"])


def test_runs_with_other_seeds_give_a_mean_and_others_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "result.json"
    outcome = json.loads(path.read_text())
    assert attack.main([str(run), str(other), "--attacks", "last-broadcast"]) == 2
    assert "the runs' seeds are 0, 0: each may be there once" in capsys.readouterr().err
    outcome["config"]["client"]["lr"] = 0.5
    path.write_text(json.dumps(outcome))
    assert attack.main([str(run), str(other), "--attacks", "last-broadcast"]) == 2
    assert "client.lr is 0.5 in the checkpoint" in capsys.readouterr().err


def of_another_seed(run: Path, other: Path, **adversary: object) -> Path:
    """A copy that says that it was another seed's, and has no checkpoint to say otherwise."""
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints", "run-id"))
    outcome = json.loads((other / "result.json").read_text())
    outcome["config"]["seed"] = 1
    outcome["config"]["adversary"] |= adversary
    (other / "result.json").write_text(json.dumps(outcome))
    return other


def test_runs_of_several_seeds_are_shown_with_their_utilities(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = of_another_seed(run, tmp_path / "other", watch=[]), tmp_path / "out.json"
    options = ["--attacks", "last-broadcast", "--json", str(out)]
    assert attack.main([str(run), str(other), *options]) == 0
    found = json.loads(out.read_text())
    assert set(found["utilities"]) == {*found["protection"], "server", "floor"}
    shown = capsys.readouterr().out.partition("means over seeds 0, 1")[2].splitlines()
    for name, each in found["utilities"].items():
        assert any(row.startswith(f" {name} ") and f"{each['mean']:.3f}" in row for row in shown)
    threats = [json.loads((x / "attacks.json").read_text())["threat"] for x in (run, other)]
    assert all(threat in found["threat"] for threat in threats)


def test_runs_with_other_adversaries_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = of_another_seed(run, tmp_path / "other", colluders=4, base="proprietary")
    options = ["--attacks", "last-broadcast", "--json", str(tmp_path / "out.json")]
    assert attack.main([str(run), str(other), *options]) == 2
    shown = capsys.readouterr().err
    assert "adversary.base is proprietary there, None here; adversary.colluders is 4" in shown
    assert "One for all, e.g.: adversary.base=null adversary.colluders=1" in shown
    assert "preparing" not in shown
    given = ["adversary.base=null", "adversary.colluders=1"]
    assert attack.main([str(run), str(other), *given, *options]) == 0


def test_without_a_whole_checkpoint_there_is_no_interval_and_it_is_said_why(
    run: Path, tmp_path: Path
) -> None:
    """The attacks, which need none, are not lost."""
    options = ["--attacks", "last-broadcast"]
    found = []
    for name in ("torn", "gone"):
        other = tmp_path / name
        shutil.copytree(run, other)
        *_, last = sorted((other / "checkpoints").iterdir())
        (last / "adapter" / "adapter_model.safetensors").unlink()
        if name == "gone":
            shutil.rmtree(other / "checkpoints")
        assert attack.main([str(other), *options]) == 0
        found.append(json.loads((other / "attacks.json").read_text())["protection"]["interval"])
    assert [each["low"] for each in found] == [None, None]
    assert "the last round's checkpoint is not whole" in found[0]["reason"]
    assert "has no checkpoint" in found[1]["reason"]


def test_a_store_that_cannot_be_used_is_noticed_before_anything_is_computed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert attack.main([str(run), "--tracking-uri", "nonsense://x", "--json", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "MLflow at 'nonsense://x'" in shown
    assert "preparing" not in shown
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the result of a run: Expecting property name"),
        ("[]", "not the result of a run: it holds no keys"),
        ("{}", "not the result of a run: no 'config'"),
        ('{"rows": []}', "not the result of a run: no 'config'"),
        ('{"config": {"seed": 0}, "history": []}', "not the result of a run: no 'history'"),
        (
            '{"config": {"seed": 0}, "history": [1], "floor": {"a": 1}, "protection": {"a": 1}}',
            "no",
        ),
        ("\udcff", "not the result of a run: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_result_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "result.json").write_bytes(text.encode(errors="surrogateescape"))
    for command in (attack, probe):
        assert command.main([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_the_mean_over_seeds_is_of_each_attack_each_level_and_all() -> None:
    def report(value: float | None, name: str = "a", threat: str = "t") -> dict[str, Any]:
        level = {"value": value, "server": 0.9, "strongest": ("a", 0.8), "floor": ("b", 0.3)}
        attacks = [{"name": name, "protection": value, "metrics": {"utility": 0.8}}]
        return {
            "threat": threat,
            "attacks": attacks,
            "levels": {"trained": level},
            "protection": level,
        }

    found = over_seeds({0: report(0.1), 1: report(0.3)})
    assert set(found["protection"]) == {"a", "strongest, trained", "strongest of all"}
    assert found["protection"]["a"]["mean"] == pytest.approx(0.2)
    assert found["protection"]["a"]["low"] == pytest.approx(0.2 - 12.7062 * 0.1, abs=1e-4)
    assert found["utilities"]["server"]["mean"] == 0.9
    assert found["utilities"]["a"]["mean"] == 0.8
    assert found["threat"] == "t"
    assert over_seeds({0: report(0.1), 1: report(None)})["protection"]["a"]["mean"] is None
    another = over_seeds({0: report(0.1), 1: report(0.1, threat="u")})
    assert another["threat"] == "seed 0: t\nseed 1: u"
    with pytest.raises(UserError, match=r"seeds 0 and 1 were not attacked by the same .*: a, b"):
        over_seeds({0: report(0.1), 1: report(0.1, name="b")})
