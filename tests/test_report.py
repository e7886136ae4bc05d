"""The summary of a sweep: non-dominated trials, failed and undefined ones, table and plot."""

from __future__ import annotations

import io
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.results import result
from fedlpp_ray.report import console_table, non_dominated, save_plot, summarize
from fedlpp_ray.runtime.sweep import TrialOutcome, outcomes_of
from fedlpp_ray.tracking.metrics import final_metrics, round_metrics
from fedlpp_ray.tune import main

OBJECTIVES = {"server/accuracy": "max", "protection": "max", "bytes/total": "min"}


def test_non_dominated_points_by_hand() -> None:
    points = [(0.9, 10.0), (0.8, 5.0), (0.8, 6.0), (0.9, 10.0), (0.7, math.nan), (0.95, 20.0)]
    assert non_dominated(points, ["max", "min"]) == [True, True, False, True, False, True]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_a_point_is_non_dominated_exactly_if_no_other_beats_it(
    points: list[tuple[int, int]],
) -> None:
    for point, best in zip(points, non_dominated(points, ["max", "min"]), strict=True):
        beaten = any(x >= point[0] and y <= point[1] and (x, y) != point for x, y in points)
        assert best is not beaten


@pytest.fixture(scope="module")
def outcomes(tiny_experiment: Experiment) -> list[TrialOutcome]:
    experiment = tiny_experiment.with_values({"federation.rounds": 1})
    backend = InProcess(experiment)
    history = list(Federation(experiment, backend).run())
    run = result(experiment, history, backend.measure_floor())
    undefined = run | {"protection": run["protection"] | {"value": None, "reason": "x"}}
    defined = run | {"protection": run["protection"] | {"value": 0.25}}
    rounds = round_metrics(history)
    trials = {
        2: (rounds | final_metrics(defined), None),
        4: (rounds | final_metrics(undefined), None),
        8: ({}, "the actor died"),
        3: (rounds | {"server/utility": 1.0}, None),
    }
    return [
        TrialOutcome(str(bits), {"downlink.bits": bits, "lora.rank": 4}, *reported, ended=bits == 3)
        for bits, reported in trials.items()
    ]


def test_failed_and_undefined_trials_stay_in_the_table(outcomes: list[TrialOutcome]) -> None:
    table = summarize(outcomes, ["downlink.bits", "lora.rank"], OBJECTIVES)
    assert list(table["downlink.bits"]) == [2, 4, 8, 3]
    assert list(table["non_dominated"]) == [True, False, False, False]
    assert list(table["status"]) == ["finished", "finished", "failed", "stopped"]
    console = Console(width=168, record=True, file=io.StringIO())
    console.print(console_table(table, ["downlink.bits", "lora.rank"]))
    best, undefined, failed, stopped = console.export_text().splitlines()[1:]
    assert best.split()[:3] == ["*", "2", "4"]
    assert best.split()[3] == f"{outcomes[0].metrics['final/utility']:.3f}"
    assert "+0.250" in best
    assert "undefined" in undefined
    assert failed.split() == ["8", "4", "-", "-", "-", "-", "-", "failed", "-", "-"]
    assert "1.000" in stopped
    assert "stopped at 1" in stopped


def test_a_search_of_many_keys_is_shown_in_full() -> None:
    keys = ["downlink.bits", "downlink.kind", "downlink.block", "downlink.full_precision_head"]
    keys += ["client.base_bits", "lora.rank", "federation.client_fraction", "defence"]
    config = dict(
        zip(keys, ["ternary", "int", 64, False, 32, 16, 0.025, "rotate-each"], strict=True)
    )
    metrics = {"server/utility": 0.5, "round": 4.0}
    stopped = TrialOutcome("1", config, metrics, None, ended=True)
    console = Console(width=168, record=True, file=io.StringIO())
    console.print(console_table(summarize([stopped], keys, OBJECTIVES), keys))
    text = console.export_text()
    words = text.split()
    assert "stopped at 4" in text
    assert set(map(str, config.values())) | {"full", "precision", "head", "fraction"} <= set(words)
    assert not any("…" in word for word in words)


def test_a_sweep_says_against_whom_protection_is(
    outcomes: list[TrialOutcome], tmp_path: Path
) -> None:
    """Of all alike once, and where trials differ by a letter in each row; always in the table."""

    def shown(*threats: str | None) -> list[str]:
        trials = [replace(outcomes[0], trial=str(i), threat=x) for i, x in enumerate(threats)]
        table = summarize([*trials, outcomes[2]], ["downlink.bits"], OBJECTIVES)
        assert [x if isinstance(x, str) else None for x in table["threat"]] == [*threats, None]
        save_plot(table, ["downlink.bits"], "accuracy", tmp_path / "x.png")
        console = Console(width=168, record=True, file=io.StringIO())
        console.print(console_table(table, ["downlink.bits"]))
        return [line.rstrip() for line in console.export_text().splitlines()]

    heading, *_, said = shown("one [client]", "one [client]")
    assert "threat" not in heading
    assert said == "threat: one [client]"
    heading, first, second, third, failed, *said = shown("one", "many", "one")
    assert heading.endswith("seconds  threat")
    assert [row.split()[-1] for row in (first, second, third, failed)] == ["a", "b", "a", "-"]
    assert said == ["threat a: one", "threat b: many"]
    *_, shared, first, second = shown("one; known; 5 broadcasts", "one; known")
    assert [shared, first, second] == [
        "threat: one; known; and",
        "threat a: 5 broadcasts",
        "threat b: no more",
    ]
    assert len(shown(*map(str, range(30)))) == 1 + 31 + 30
    assert "threat" not in "".join(shown(None))


def test_plots_are_drawn_also_of_sweeps_with_failures(
    outcomes: list[TrialOutcome], tmp_path: Path
) -> None:
    for chosen in (outcomes, outcomes[:1]):
        table = summarize(chosen, ["downlink.bits"], OBJECTIVES)
        save_plot(table, ["downlink.bits"], "accuracy", tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_sweep_without_server_models_has_a_table_and_a_plot(
    outcomes: list[TrialOutcome], tmp_path: Path
) -> None:
    metrics = {
        k: v for k, v in outcomes[0].metrics.items() if k.split("/")[0] not in ("server", "final")
    }
    table = summarize(
        [replace(outcomes[0], metrics=metrics)], ["downlink.bits"], {"bytes/total": "min"}
    )
    assert list(table["non_dominated"]) == [True]
    console_table(table, ["downlink.bits"])
    save_plot(table, ["downlink.bits"], "accuracy", tmp_path / "x.png")


def test_a_sweep_of_failures_has_a_table(outcomes: list[TrialOutcome]) -> None:
    table = summarize(outcomes[2:3], ["downlink.bits"], OBJECTIVES)
    assert list(table["non_dominated"]) == [False]
    console_table(table, ["downlink.bits"])


def test_a_sweep_that_was_interrupted_shows_what_has_reported() -> None:
    """Of a trial that has not, Tune has no configuration."""
    config = {"lora.rank": 4, "trial": 0}
    failed = SimpleNamespace(metrics={}, config=None, error=ValueError("no"), path="x/b")
    results = [
        SimpleNamespace(metrics={"trial_id": "c"}, config=None, error=None, path="x/c"),
        failed,
        SimpleNamespace(
            metrics={"trial_id": "a", "server/accuracy": 0.5, "config": config},
            config=config,
            error=None,
            path="x/a",
        ),
        SimpleNamespace(
            metrics={"trial_id": "d", "round": 2, "config": config, "done": True},
            config=config,
            error=None,
            path="x/d",
        ),
    ]
    outcomes = outcomes_of(results)
    ends = {each.trial: each.status for each in outcomes}
    assert ends == {"a": "unfinished", "b": "failed", "d": "stopped"}
    table = summarize(outcomes, ["lora.rank"], {"server/accuracy": "max"})
    assert not table["non_dominated"].any()
    assert table["lora.rank"][0] == 4
    assert outcomes_of([results[0]]) == []


@pytest.mark.parametrize("ends", [(True, True), (True, False), (True,)])
def test_an_interrupted_sweep_says_so_and_is_no_success(
    outcomes: list[TrialOutcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: tuple[bool, ...],
) -> None:
    """Tune returns as if nothing had been. One of two trials finished; the other, if it has
    started, was stopped or interrupted."""
    found = [outcomes[0], *(replace(outcomes[3], ended=end) for end in ends[1:])]
    monkeypatch.setattr("fedlpp_ray.runtime.connect", lambda _: nullcontext())
    monkeypatch.setattr("fedlpp_ray.runtime.plan.show_plan", lambda *_, **__: None)
    monkeypatch.setattr("fedlpp_ray.runtime.sweep.run_sweep", lambda *_: found)
    (tmp_path / "base.yaml").write_text(dump_experiment(Experiment(), "base", "x"))
    (tmp_path / "space.py").write_text(
        "from ray import tune\nbase = 'base.yaml'\nobjectives = {'protection': 'max'}\n"
        "param_space = {'downlink.bits': tune.grid_search([2, 3])}\n"
    )
    command = [str(tmp_path / "space.py"), "--storage", str(tmp_path / "results")]
    interrupted = ends != (True, True)
    assert main(command) == int(interrupted)
    said = "interrupted: the same command goes on" in capsys.readouterr().err
    assert said == interrupted
