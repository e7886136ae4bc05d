"""What Optuna hears of trials that were stopped, failed, or ended without protection."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.report import summarize
from fedlpp_ray.runtime import connect
from fedlpp_ray.runtime.searcher import OfFinished
from fedlpp_ray.runtime.space import load_space
from fedlpp_ray.runtime.sweep import TrialOutcome, run_sweep

METRICS = ["final/accuracy", "protection", "bytes/total"]
FINISHED = {"final/accuracy": 0.9, "protection": 0.1, "bytes/total": 50.0, "round": 10.0}
STOPPED = {"server/accuracy": 0.6, "bytes/total": 20.0, "round": 4.0}
UNDEFINED = FINISHED | {"protection": math.nan}
SPACE = {"lora.rank": tune.choice([4, 8, 16]), "downlink.bits": tune.choice(["ternary", 2, 4])}


def made(**options: Any) -> tuple[OfFinished, OptunaSearch]:
    values = {"metric": METRICS, "mode": ["max", "max", "min"], "seed": 0} | options
    search = OptunaSearch(**values)
    searcher = OfFinished(search)
    searcher.set_search_properties(None, None, SPACE)
    return searcher, search


def states(search: OptunaSearch) -> list[TrialState]:
    return [trial.state for trial in search._ot_study.trials]


def test_only_a_whole_result_is_one() -> None:
    searcher, search = made()
    ends = {"finished": FINISHED, "stopped": STOPPED, "undefined": UNDEFINED, "unstarted": None}
    for trial in (*ends, "failed", "running"):
        assert searcher.suggest(trial).keys() == SPACE.keys()
    for trial, result in ends.items():
        searcher.on_trial_complete(trial, result)
    searcher.on_trial_complete("failed", error=True)
    pruned = [TrialState.PRUNED] * 3
    assert states(search) == [TrialState.COMPLETE, *pruned, TrialState.FAIL, TrialState.RUNNING]
    (best,) = search._ot_study.best_trials
    assert best.values == [0.9, 0.1, 50.0]


def test_a_stopped_trial_is_none_even_with_every_objective() -> None:
    """Its bytes are those of four rounds: no other trial could ever dominate it."""
    searcher, search = made(metric=["server/accuracy", "bytes/total"], mode=["max", "min"])
    for trial in "ab":
        searcher.suggest(trial)
    searcher.on_trial_complete("a", STOPPED)
    searcher.on_trial_complete("b", FINISHED | {"server/accuracy": 0.9})
    assert [trial.values for trial in search._ot_study.best_trials] == [[0.9, 50.0]]
    outcomes = [
        TrialOutcome("a", {"lora.rank": 4}, STOPPED, None),
        TrialOutcome("b", {"lora.rank": 8}, FINISHED | {"server/accuracy": 0.9}, None),
    ]
    table = summarize(outcomes, ["lora.rank"], {"server/accuracy": "max", "bytes/total": "min"})
    assert list(table["non_dominated"]) == [False, True]


def test_one_objective_is_passed_on_in_the_rounds_that_have_it() -> None:
    searcher, search = made(metric="server/accuracy", mode="max")
    searcher.suggest("a")
    searcher.on_trial_result("a", {"bytes/total": 1.0, "training_iteration": 1})
    searcher.on_trial_result("a", {"server/accuracy": 0.5, "training_iteration": 2})
    searcher.on_trial_complete("a", STOPPED)
    (trial,) = search._ot_study.trials
    assert (trial.state, trial.intermediate_values) == (TrialState.PRUNED, {2: 0.5})


def test_the_same_seed_gives_the_same_search() -> None:
    def run(seed: int) -> list[Any]:
        searcher, _ = made(seed=seed)
        chosen = []
        for trial in map(str, range(14)):  # TPE learns from the eleventh
            chosen.append(searcher.suggest(trial))
            bits = chosen[-1]["downlink.bits"]
            accuracy = 0.5 if bits == "ternary" else 0.9
            result = FINISHED | {"final/accuracy": accuracy, "bytes/total": float(len(chosen) % 5)}
            searcher.on_trial_complete(trial, STOPPED if len(chosen) % 4 == 0 else result)
        return chosen

    assert run(0) == run(0) != run(1)


def test_what_was_told_is_saved(tmp_path: Path) -> None:
    searcher, search = made()
    for trial in "abc":
        searcher.suggest(trial)
    searcher.on_trial_complete("a", FINISHED)
    searcher.on_trial_complete("b", STOPPED)
    searcher.save_to_dir(str(tmp_path), "x")
    again, search = made()
    again.restore_from_dir(str(tmp_path))
    again.on_trial_complete("c", FINISHED | {"protection": 0.2})
    assert states(search) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]


SWEEP = """
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

base = "tiny.yaml"
bundles = {"pace": {"none": {"client.lr": 1e-12}, "some": {"client.lr": 3e-2}}}
param_space = {
    "pace": tune.choice(["none", "some"]),
    "runtime.client_actors": 1,
    "evaluation.every": 2,  # rounds 2, 4 and 5: the others report no accuracy
}
objectives = {"final/accuracy": "max", "bytes/total": "min"}
search = OptunaSearch(
    metric=["final/accuracy", "protection"],
    mode=["max", "max"],
    points_to_evaluate=[{"pace": "some"}, {"pace": "none"}],
)
tune_config = tune.TuneConfig(
    num_samples=2,
    max_concurrent_trials=1,
    search_alg=search,
    scheduler=ASHAScheduler(metric="server/accuracy", mode="max", grace_period=2, max_t=5),
)
"""


@pytest.mark.slow
def test_a_stopped_trial_in_a_sweep_is_pruned_and_stays_so(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    experiment = tiny_experiment.with_values({"federation.rounds": 5, "federation.local_steps": 20})
    (tmp_path / "tiny.yaml").write_text(dump_experiment(experiment, "tiny", "x"))
    (tmp_path / "space.py").write_text(SWEEP)
    with connect():
        runs = [
            run_sweep(load_space(tmp_path / "space.py"), str(tmp_path / "out"), [])
            for _ in range(2)  # the second finds all of it done
        ]
    assert runs[0] == runs[1]
    by_pace = {outcome.config["pace"]: outcome for outcome in runs[0]}
    assert by_pace["some"].status == "finished"
    assert (by_pace["none"].status, by_pace["none"].metrics["round"]) == ("stopped", 2)
    *_, state = sorted((tmp_path / "out").glob("*/searcher-state-*.pkl"))  # of the second
    found = pickle.loads(state.read_bytes())["_ot_study"].trials
    assert [(trial.params["pace"], trial.state) for trial in found] == [
        ("some", TrialState.COMPLETE),
        ("none", TrialState.PRUNED),
    ]
