"""A sweep in which one trial fails and one is stopped early: the others count, nothing is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.report import console_table, save_plot, summarize
from fedlpp_ray.runtime import PlacementError, connect
from fedlpp_ray.runtime.space import load_space
from fedlpp_ray.runtime.sweep import run_sweep

SPACE = """
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

base = "tiny.yaml"
# The first refuses every update; the second is stopped after a round; the third, at its end.
param_space = {
    "server.max_update_norm": tune.grid_search([1e-9, 999.0, 1000.0]),
    "runtime.client_actors": 1,
}
objectives = {"server/accuracy": "max", "bytes/total": "min"}


class Stop(FIFOScheduler):
    def on_trial_result(self, controller, trial, result):
        if trial.config["server.max_update_norm"] == 999.0:
            return TrialScheduler.STOP
        # As ASHA does with max_t = rounds: a finished run is finished all the same.
        return TrialScheduler.STOP if result["round"] == 3 else TrialScheduler.CONTINUE


tune_config = tune.TuneConfig(scheduler=Stop())
"""


@pytest.fixture
def cluster() -> Iterator[None]:
    with connect():
        yield


@pytest.fixture
def space_file(tmp_path: Path, tiny_experiment: Experiment) -> Path:
    (tmp_path / "tiny.yaml").write_text(dump_experiment(tiny_experiment, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    return tmp_path / "space.py"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_failed_and_stopped_trials_cost_only_themselves(space_file: Path) -> None:
    space = load_space(space_file)
    failed, stopped, well = run_sweep(space, str(space_file.parent / "out"), [])
    assert failed.status == "failed"
    assert "its norm is" in (failed.error or "")
    assert (stopped.status, stopped.error) == ("stopped", None)
    assert stopped.metrics["round"] < 3
    assert (well.status, well.error) == ("finished", None)
    assert well.metrics["round"] == 3
    table = summarize([failed, stopped, well], space.keys, space.objectives)
    assert list(table["non_dominated"]) == [False, False, True]
    assert table["server/accuracy"][1] == stopped.metrics["server/accuracy"]
    console_table(table, space.keys)
    save_plot(table, space.keys, "accuracy", space_file.parent / "x.png")
    check_nothing_is_left()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_sweep_does_not_wait_for_ever(space_file: Path) -> None:
    space = load_space(space_file, ["runtime.start_timeout=5.0", "runtime.client_cpus=1.0"])
    taken = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 1}])
    assert taken.wait(30)
    with pytest.raises(
        PlacementError, match=r"no trial has got its resources for 5 s .*1 CPU free"
    ):
        run_sweep(space, str(space_file.parent / "out"), [])
    remove_placement_group(taken)


def check_nothing_is_left() -> None:
    for _ in range(100):
        actors = ray._private.state.actors().values()
        alive = [actor for actor in actors if actor["State"] != "DEAD"]
        if not alive:
            break
        time.sleep(0.2)
    assert alive == []
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


SEARCHED = """
from ray import tune
from ray.tune.search import Searcher


class Chooser(Searcher):
    def set_search_properties(self, metric, mode, config, **spec):
        return True

    def suggest(self, trial_id):
        self.ranks = getattr(self, "ranks", [4, 0])
        return {"lora.rank": self.ranks.pop(), "runtime.client_actors": 1}

    def on_trial_complete(self, trial_id, result=None, error=False):
        pass

    def save(self, checkpoint_path):
        pass

    def restore(self, checkpoint_path):
        pass


base = "tiny.yaml"
param_space = {"lora.rank": tune.randint(1, 8)}
objectives = {"server/accuracy": "max"}
tune_config = tune.TuneConfig(num_samples=2, search_alg=Chooser("server/accuracy", "max"))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_invalid_choice_of_a_searcher_costs_only_itself(space_file: Path) -> None:
    space_file.write_text(SEARCHED)
    outcomes = run_sweep(load_space(space_file), str(space_file.parent / "out"), [])
    by_rank = {outcome.config["lora.rank"]: outcome for outcome in outcomes}
    assert "lora.rank: must be greater than or equal to 1" in (by_rank[0].error or "")
    assert by_rank[4].status == "finished"


@pytest.mark.usefixtures("cluster")
def test_a_sweep_that_cannot_be_placed_starts_nothing(space_file: Path) -> None:
    space = load_space(space_file, ["runtime.client_cpus=99.0"])
    with pytest.raises(PlacementError, match="one actor requires 99 CPU"):
        run_sweep(space, str(space_file.parent / "out"), [])
    assert not (space_file.parent / "out").exists()


WARM = """
from ray import tune

base = "tiny.yaml"
param_space = {"lora.rank": tune.grid_search([2, 3, 4]), "runtime.client_actors": 1}
objectives = {"server/accuracy": "max"}
tune_config = tune.TuneConfig(max_concurrent_trials=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "actors"),
    [
        ("federated", {"Party": 2}),
        ("centralised", {"RayTrainWorker": 1}),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_one_trial_after_the_other_uses_the_same_actors(
    space_file: Path, method: str, actors: dict[str, int]
) -> None:
    """A server and a client host, or one worker, for three trials."""
    space_file.write_text(WARM)
    space = load_space(space_file, [f"method={method}"])
    outcomes = run_sweep(space, str(space_file.parent / "out"), [])
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    started = Counter(actor["ActorClassName"] for actor in ray._private.state.actors().values())
    assert {kind: started[kind] for kind in ("Party", "RayTrainWorker") if started[kind]} == actors
    check_nothing_is_left()


MIXED = """
from ray import tune

base = "tiny.yaml"
# Of 2 CPUs a federated trial takes 1 or 1.5, a centralised one of one worker 0.5, of two 1.
param_space = {
    "method": tune.grid_search(["centralised", "federated"]),
    "server.num_workers": tune.grid_search([1, 2]),
    "lora.rank": tune.grid_search([2, 4]),
    "runtime.client_actors": 1,
    "runtime.client_cpus": 0.5,
}
objectives = {"server/accuracy": "max"}
"""


@pytest.fixture
def two_cpus() -> Iterator[None]:
    """A cluster with 2 CPUs to give, whatever the machine has."""
    with connect():
        others = ray.cluster_resources()["CPU"] - 2
        taken = placement_group([{"CPU": others}]) if others > 0 else None
        assert taken is None or taken.wait(30)
        yield
        if taken:
            remove_placement_group(taken)


@pytest.mark.long
@pytest.mark.usefixtures("two_cpus")
def test_more_trials_than_room_of_all_kinds_end_well(space_file: Path) -> None:
    """A centralised trial reserves in one piece what its workers take, as a federated one does."""
    space_file.write_text(MIXED)
    outcomes = run_sweep(load_space(space_file), str(space_file.parent / "out"), [])
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [("finished", None)] * 8
    assert {outcome.metrics["bytes/total"] > 0 for outcome in outcomes} == {True, False}
    actors = ray._private.state.actors().values()
    assert {"Controller", "Party"} <= {actor["ActorClassName"] for actor in actors}
