"""A server whose model is spread over ranks: the same experiment as on one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.server import Server
from fedlpp_ray.training import Group
from tests import tiny
from tests.federation.test_loop import numbers
from tests.ranks import Ranks

pytest.importorskip("deepspeed")
SPREAD = {"server.zero.stage": 3, "server.zero.stage3_param_persistence_threshold": 0}
"""Small tensors too: DeepSpeed leaves those below 100,000 numbers whole."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module", params=["classification", "llama", "gpt2"])
def experiment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_values: Any
) -> Experiment:
    server = {"server.examples": 21, "server.tune_steps": 3, "server.tune_lr": 1e-2}
    rounds = {"federation.rounds": 2, "client.base_bits": 4, "downlink.bits": 4}
    if request.param == "classification":
        return Experiment().with_values(tiny_values | server | rounds)
    folder = tmp_path_factory.mktemp("generation")
    tiny.make_generator(folder / "model", family=request.param)
    draw = random.Random(0)
    words = [draw.choice(draw.choice(list(tiny.TOPICS.values()))) for _ in range(200)]
    rows = [{"thing": f"{draw.choice(tiny.COMMON)} {w}", "says": f"a {w} is near"} for w in words]
    tiny.write_csv(folder / "data.csv", rows)
    return Experiment().with_values(
        {
            "model.name": str(folder / "model"),
            "task.name": "generation",
            "task.data": str(folder / "data.csv"),
            "task.prompt": "what is the {thing}",
            "task.target": "{says}",
            "task.held_out": 21,
            "task.max_length": 16,
            "generation.max_new_tokens": 6,
            "generation.beams": 2,
            "evaluation.batch_size": 6,
            "lora.rank": 4,
            "client.lr": 2e-2,
            "federation.clients": 4,
            "federation.client_fraction": 0.5,
            "federation.local_steps": 4,
            **server,
            **rounds,
        }
    )


def run(group: Group, experiment: Experiment) -> Any:
    """The numbers of a run; of rank 0."""
    if group.rank:
        return Server.follow(experiment, group)
    backend = InProcess(experiment, group)
    federation = Federation(experiment, backend)
    list(federation.run())
    backend.close()
    return numbers(federation.history)


def test_a_run_is_the_same_on_one_rank_on_two_and_on_four(
    experiment: Experiment, two: Ranks, four: Ranks
) -> None:
    alone = run(Group(), experiment)
    spread = experiment.with_values(SPREAD)
    print(alone)
    for ranks in (two, four):
        found = ranks.run(run, spread)[0]
        print(found)
