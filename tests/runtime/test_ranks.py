"""Parties of several ranks in Ray: the numbers of one process, also after a rank is lost."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fedlpp_ray.assets import AssetError
from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.runtime import RayBackend, check_fits, connect
from fedlpp_ray.runtime import backend as backend_module
from fedlpp_ray.runtime.placement import PlacementError, bundles
from tests.federation.test_loop import numbers
from tests.ranks import CLIENT, SERVER, TUNED, close
from tests.runtime.backends import disturbed, reserved

SPREAD = {
    "server.num_workers": 2,
    "client.num_workers": 2,
    "runtime.client_actors": 1,
    "runtime.server_cpus": 0.25,
    "runtime.client_cpus": 0.25,
    **(SERVER | CLIENT if importlib.util.find_spec("deepspeed") else {}),
}


@pytest.fixture(scope="module")
def experiment(tiny_values: Any, still_model: Path) -> Experiment:
    values = {"model.name": str(still_model), "client.base_bits": 4, "federation.rounds": 2}
    return Experiment().with_values(tiny_values | TUNED | values)


@pytest.fixture(scope="module")
def spread(experiment: Experiment) -> Experiment:
    return experiment.with_values(SPREAD)


@pytest.fixture(scope="module")
def actors(spread: Experiment) -> Iterator[RayBackend]:
    with connect(spread.runtime), reserved(spread) as backend:
        yield backend


@pytest.fixture(scope="module")
def together(spread: Experiment, actors: RayBackend) -> list[dict[str, object]]:
    """A run without any fault."""
    assert len(bundles(spread)) == 4
    return run(spread, actors)


def run(experiment: Experiment, backend: Any) -> list[dict[str, object]]:
    federation = Federation(experiment, backend)
    list(finished_rounds(federation))
    return numbers(federation.history)


@pytest.mark.slow
def test_a_run_has_the_numbers_and_bytes_of_one_process(
    experiment: Experiment, actors: RayBackend, together: list[dict[str, object]]
) -> None:
    backend = InProcess(experiment)
    alone = run(experiment, backend)
    assert close(together, alone)
    assert [each["bytes"] for each in together] == [each["bytes"] for each in alone]
    floor, other = actors.measure_floor(), backend.measure_floor()
    assert close([floor.base, floor.local_only], [other.base, other.local_only])


@pytest.mark.slow
def test_the_same_ranks_serve_the_next_run(
    experiment: Experiment, spread: Experiment, actors: RayBackend
) -> None:
    """As in a sweep: DeepSpeed begins again in the same processes."""
    other = {"seed": 1, "lora.rank": 2}
    before = others(actors.server.actor)
    assert actors.begin(spread.with_values(other))
    alone = run(experiment.with_values(other), InProcess(experiment.with_values(other)))
    assert close(run(spread.with_values(other), actors), alone)
    assert others(actors.server.actor) == before
    assert not actors.begin(spread.with_values({"client.num_workers": 1}))


def others(actor: Any) -> Any:
    """Ids of the other ranks' actors of a party."""
    return in_actor(actor, lambda self: [each._actor_id.hex() for each in self._ranks._actors])


def in_actor(actor: Any, do: Any) -> Any:
    return ray.get(actor.__ray_call__.remote(do))


def actor_of(actors: RayBackend, party: str) -> Any:
    return actors.server.actor if party == "server" else actors.pool.slots[0].actor


def kill_a_rank(actor: Any) -> None:
    in_actor(actor, lambda self: ray.kill(self._ranks._actors[0]))


@pytest.mark.slow
@pytest.mark.parametrize("party", ["server", pytest.param("client", marks=pytest.mark.long)])
def test_a_run_that_loses_a_rank_ends_with_the_same_bits(
    spread: Experiment, actors: RayBackend, together: list[dict[str, object]], party: str
) -> None:
    assert actors.begin(spread)
    lost = actor_of(actors, party)
    assert disturbed(spread, actors, lambda: kill_a_rank(lost)) == together
    assert actor_of(actors, party) != lost


@pytest.mark.long
@pytest.mark.parametrize("party", ["server", "client"])
def test_a_rank_that_is_lost_between_runs_is_made_good(
    spread: Experiment, actors: RayBackend, together: list[dict[str, object]], party: str
) -> None:
    """As between the trials of a sweep."""
    assert actors.begin(spread)
    kill_a_rank(actor_of(actors, party))
    assert actors.begin(spread)
    assert run(spread, actors) == together


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="no base comes from a server")
def test_a_server_lost_while_the_first_client_receives_its_base_is_made_good(
    monkeypatch: pytest.MonkeyPatch,
    experiment: Experiment,
    spread: Experiment,
    actors: RayBackend,
    tmp_path: Path,
) -> None:
    """Three clients that start, all attempts of one, find no server."""

    def lose(server: Any, number: int) -> bytes:
        lost = len(list(tmp_path.iterdir()))
        if lost < 3:
            (tmp_path / str(lost)).touch()
            ray.kill(server)
        return part_of(server, number)

    part_of = backend_module._part_of
    monkeypatch.setattr(backend_module, "_part_of", lose)
    other = {"client.base_bits": 3}  # which no cache has
    assert actors.begin(spread.with_values(other))
    assert len(list(tmp_path.iterdir())) == 3
    alone = experiment.with_values(other)
    assert close(run(spread.with_values(other), actors), run(alone, InProcess(alone)))


@pytest.mark.slow
def test_what_one_rank_alone_refuses_is_said_with_its_number(
    spread: Experiment, actors: RayBackend
) -> None:
    """For instance a checkpoint that is on one node and not on another."""

    def spoil(_: Any) -> None:
        from fedlpp_ray.federation import server

        def refuse(*_: object) -> None:
            raise AssetError("model.name = 'x': not on this node")

        server.ServerModel.__init__ = refuse  # type: ignore[assignment, method-assign]

    assert actors.begin(spread)

    def spoil_a_rank(self: Any) -> None:
        self._ranks._actors[0].__ray_call__.remote(spoil)  # when it has done what it does now

    in_actor(actors.server.actor, spoil_a_rank)
    with pytest.raises(UserError, match=r"rank 1: .*not on this node"):
        actors.begin(spread.with_values({"seed": 3}))


def test_what_the_ranks_need_is_reserved_and_refused_where_it_cannot_be(
    spread: Experiment, actors: RayBackend
) -> None:
    check_fits(bundles(spread), 2)
    wide = spread.with_values({"server.num_workers": 3, "runtime.server_cpus": 0.75})
    with pytest.raises(PlacementError, match=r"requires .* CPU \(server: 3, client actors: 2\)"):
        check_fits(bundles(wide), 3)
