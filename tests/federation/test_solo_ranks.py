"""A centralised run on several ranks: the numbers of one rank, whatever they share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation, RoundRecord, checkpoint
from fedlpp_ray.federation.solo import TRAINING, Solo
from fedlpp_ray.training import ALONE, Group
from tests import tiny
from tests.federation.test_loop import numbers
from tests.ranks import SERVER, STAGE_2, Ranks


@pytest.fixture(scope="module")
def experiment(tiny_values: dict[str, object], still_model: Path) -> Experiment:
    values = {"method": "centralised", "model.name": str(still_model), "client.base_bits": 4}
    return Experiment().with_values(tiny_values | values | {"client.schedule": "linear"})


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A language model that writes, of a family that has no dropout."""
    values = tiny.make_writing(tmp_path_factory.mktemp("generation"), "llama")
    own = {"method": "centralised", "lora.dropout": 0.0, "client.batch_size": 5}
    return Experiment().with_values(values | own | {"federation.rounds": 2})


def run(group: Group, experiment: Experiment) -> Any:
    """The history and the floor; of rank 0."""
    if group.rank:
        return Solo.follow(experiment, group)
    backend = Solo(experiment, group)
    federation = Federation(experiment, backend)
    list(federation.run())
    floor = backend.measure_floor()
    backend.close()
    return federation.history, floor


def measured(history: list[RoundRecord]) -> list[dict[str, float]]:
    assert all(record.evaluation and record.evaluation.server for record in history)
    return [record.evaluation.server | {"loss": record.loss[0]} for record in history]


def check_close(found: Any, expected: Any) -> None:
    for one, other in zip(measured(found[0]), measured(expected[0]), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert found[1] == expected[1]  # of one client in one process, always


@pytest.mark.slow
def test_ranks_share_the_batches(experiment: Experiment, two: Ranks) -> None:
    """7 examples a batch: one rank has 4 of them, the other 3."""
    uneven = experiment.with_values({"client.batch_size": 7})
    check_close(two.run(run, uneven)[0], run(ALONE, uneven))


@pytest.mark.slow
@pytest.mark.parametrize("values", [SERVER, STAGE_2], ids=["base", "optimizer"])
@pytest.mark.parametrize("task", ["experiment", "writer"])
def test_ranks_share_the_base_or_the_optimizer(
    task: str, values: dict[str, object], request: pytest.FixtureRequest, two: Ranks
) -> None:
    experiment = request.getfixturevalue(task)
    check_close(two.run(run, experiment.with_values(values))[0], run(ALONE, experiment))


def whole_and_resumed(group: Group, experiment: Experiment, folder: Path) -> Any:
    """Of rank 0: the numbers of a run, and of one that goes on after its first round."""
    if group.rank:
        Solo.follow(experiment, group)
        return Solo.follow(experiment, group)
    backend = Solo(experiment, group)
    whole = Federation(experiment, backend)
    rounds = whole.run()
    next(rounds)
    checkpoint.save(whole, folder)
    list(rounds)
    backend.close()
    backend = Solo(experiment, group)
    resumed = Federation(experiment, backend)
    checkpoint.restore(resumed, folder)
    list(resumed.run())
    backend.close()
    return numbers(whole.history), numbers(resumed.history)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{}, SERVER, STAGE_2], ids=["whole", "base", "optimizer"])
def test_a_resumed_run_has_the_same_bits(
    tiny_experiment: Experiment, two: Ranks, tmp_path: Path, zero: dict[str, object]
) -> None:
    """With dropout, whose random numbers go on on each rank; with stage 2 each has its share of
    the optimizer, too, and a copy of the parameters that must not be the old one."""
    values = {"method": "centralised", "lora.dropout": 0.3, "client.schedule": "linear"}
    experiment = tiny_experiment.with_values(values | zero)
    whole, resumed = two.run(whole_and_resumed, experiment, tmp_path)[0]
    assert whole == resumed
    assert whole[-1]["digest"] != whole[0]["digest"]


def generators(group: Group, experiment: Experiment) -> Any:
    """What rank 0 keeps of the ranks' generators."""
    if group.rank:
        return Solo.follow(experiment, group)
    backend = Solo(experiment, group)
    kept = torch.load(io.BytesIO(backend.adapter()[TRAINING]), weights_only=True)
    backend.close()
    return [state[0] for state in (kept["random"], *kept["others"])]


def test_ranks_draw_their_own_dropout(experiment: Experiment, two: Ranks) -> None:
    first, second = two.run(generators, experiment)[0]
    assert not torch.equal(first, second)


def test_one_rank_keeps_its_generators_alone(experiment: Experiment) -> None:
    assert len(generators(ALONE, experiment)) == 1
