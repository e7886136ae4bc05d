"""Parties of several ranks in Ray: the numbers of one process, also after a rank is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.runtime import RayBackend, connect, reserve
from tests import tiny
from tests.federation.test_loop import numbers

pytest.importorskip("deepspeed")

SPREAD = {
    "server.num_workers": 2,
    "server.zero.stage": 3,
    "server.zero.stage3_param_persistence_threshold": 0,
    "client.num_workers": 2,
    "client.zero.stage": 3,
    "client.zero.stage3_param_persistence_threshold": 0,
    "runtime.client_actors": 1,
    "runtime.server_cpus": 0.25,
    "runtime.client_cpus": 0.25,
}


@pytest.fixture(scope="module")
def experiment(
    tiny_values: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    model = tiny.make_model(tmp_path_factory.mktemp("ranks") / "model", dropout=0.0)
    return Experiment().with_values(
        tiny_values | {"model.name": str(model), "client.base_bits": 4, "federation.rounds": 2}
    )


@pytest.fixture(scope="module")
def spread(experiment: Experiment) -> Experiment:
    return experiment.with_values(SPREAD)


@pytest.fixture(scope="module")
def actors(spread: Experiment) -> Iterator[RayBackend]:
    with (
        connect(spread.runtime),
        reserve(spread) as group,
        closing(RayBackend(spread, group)) as made,
    ):
        yield made


def test_a_run_has_the_numbers_of_one_process(
    experiment: Experiment, spread: Experiment, actors: RayBackend
) -> None:
    alone = Federation(experiment, InProcess(experiment))
    list(alone.run())
    together = Federation(spread, actors)
    list(together.run())
    print(numbers(alone.history)[1])
    print(numbers(together.history)[1])
    print(actors.measure_floor())
