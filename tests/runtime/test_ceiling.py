"""The centralised run on Ray Train's workers: the numbers of one process, whatever is lost."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.util.placement_group import placement_group_table

from fedlpp_ray.assets import AssetError
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation, checkpoint
from fedlpp_ray.federation.backend import ServerLost
from fedlpp_ray.federation.recovery import LOSSES, finished_rounds
from fedlpp_ray.federation.solo import Solo
from fedlpp_ray.runtime import PlacementError, check_fits, connect, ray_backend, reserve
from fedlpp_ray.runtime.actors import ClosingBackend
from fedlpp_ray.runtime.placement import bundles
from fedlpp_ray.runtime.ranks import RankLost
from fedlpp_ray.runtime.trainer import _why
from fedlpp_ray.runtime.trial import trial_resources
from fedlpp_ray.training import ALONE
from tests.federation.test_loop import numbers
from tests.federation.test_solo_ranks import check_close, run
from tests.ranks import SERVER
from tests.runtime.backends import disturbed, reserved


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connect():
        yield


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment) -> Experiment:
    """With dropout and learning rates that fall: what a training must remember."""
    values = {"method": "centralised", "lora.dropout": 0.3, "client.schedule": "linear"}
    return tiny_experiment.with_values(values | {"runtime.start_timeout": 120.0})


@pytest.fixture(scope="module")
def on_two(experiment: Experiment) -> Experiment:
    return experiment.with_values({"server.num_workers": 2})


@pytest.fixture(scope="module")
def two(on_two: Experiment) -> Iterator[ClosingBackend]:
    with reserved(on_two) as backend:
        yield backend


@pytest.fixture(scope="module")
def expected(on_two: Experiment, two: ClosingBackend) -> list[dict[str, object]]:
    """The numbers of two ranks, undisturbed."""
    assert two.begin(on_two)
    return numbers(list(Federation(on_two, two).run()))


def train_workers() -> list[dict[str, Any]]:
    """Ray Train's, in the order in which they were made."""
    actors = ray._private.state.actors().values()
    alive = [a for a in actors if a["State"] == "ALIVE" and a["ActorClassName"] == "RayTrainWorker"]
    return sorted(alive, key=lambda actor: actor["StartTime"])


def reservations() -> set[str]:
    groups = placement_group_table().values()
    return {found["placement_group_id"] for found in groups if found["state"] == "CREATED"}


def fits() -> list[str]:
    folders = [str(path) for path in Path(tempfile.gettempdir()).glob("fedlpp_ray-fit-*")]
    return folders + [thread.name for thread in threading.enumerate() if thread.name == "fit"]


@pytest.mark.long
def test_one_worker_has_the_bits_of_a_process(experiment: Experiment, tmp_path: Path) -> None:
    """In the run's own reservation, resumed in other workers, and nothing is left of either."""
    here, before = Solo(experiment), (reservations(), fits())
    alone = numbers(list(Federation(experiment, here).run()))
    with reserve(experiment) as group:
        with closing(ray_backend(experiment, group)) as backend:
            assert reservations() - before[0] == {group.id.hex()}
            assert ray.available_resources().get(f"CPU_group_0_{group.id.hex()}", 0) == 0
            federation = Federation(experiment, backend)
            rounds = federation.run()
            next(rounds)
            checkpoint.save(federation, tmp_path)
            assert numbers([*federation.history[:1], *rounds]) == alone
            assert backend.measure_floor() == here.measure_floor()
        with closing(ray_backend(experiment, group)) as backend:
            resumed = Federation(experiment, backend)
            checkpoint.restore(resumed, tmp_path)
            list(resumed.run())
            assert numbers(resumed.history) == alone
    assert fits() == before[1]
    assert reservations() == before[0]


@pytest.mark.slow
def test_two_workers_train_on_in_another_run(
    on_two: Experiment, two: ClosingBackend, expected: list[dict[str, object]]
) -> None:
    workers = {actor["ActorID"] for actor in train_workers()}
    assert len(workers) == 2
    assert two.begin(on_two)
    assert numbers(list(Federation(on_two, two).run())) == expected
    assert {actor["ActorID"] for actor in train_workers()} == workers


STILL = {"lora.dropout": 0.0, "client.base_bits": 4}


@pytest.fixture
def still(on_two: Experiment, still_model: Path) -> Experiment:
    return on_two.with_values(STILL | {"model.name": str(still_model)})


@pytest.mark.slow
def test_two_workers_have_the_numbers_of_one(still: Experiment, two: ClosingBackend) -> None:
    assert two.begin(still)
    check_close(run_on(two, still), run(ALONE, still.with_values({"server.num_workers": 1})))


@pytest.mark.long
def test_two_workers_that_share_the_base_have_the_numbers_of_one(still: Experiment) -> None:
    pytest.importorskip("deepspeed")
    spread = still.with_values(SERVER)
    with reserved(spread) as backend:
        found = run_on(backend, spread)
    check_close(found, run(ALONE, still.with_values({"server.num_workers": 1})))


def run_on(backend: ClosingBackend, experiment: Experiment) -> Any:
    """The history and the floor."""
    federation = Federation(experiment, backend)
    list(federation.run())
    return federation.history, backend.measure_floor()


@pytest.mark.long
@pytest.mark.parametrize("which", [1, 0])
def test_a_worker_dies_between_rounds(
    on_two: Experiment, two: ClosingBackend, expected: list[dict[str, object]], which: int
) -> None:
    assert two.begin(on_two)

    def kill() -> None:
        os.kill(train_workers()[which]["Pid"], signal.SIGKILL)

    assert disturbed(on_two, two, kill) == expected
    assert len(train_workers()) == 2


@pytest.mark.long
def test_a_worker_dies_in_a_round(
    on_two: Experiment, two: ClosingBackend, expected: list[dict[str, object]]
) -> None:
    """While the other waits for its gradients."""
    assert two.begin(on_two)

    def stop_then_kill() -> None:
        pid = train_workers()[1]["Pid"]
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(3, os.kill, [pid, signal.SIGKILL]).start()

    assert disturbed(on_two, two, stop_then_kill) == expected


@pytest.mark.long
def test_workers_that_always_die_end_the_run(
    on_two: Experiment, two: ClosingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert two.begin(on_two)
    federation = Federation(on_two, two)
    starts = []
    renew = two.renew_server

    def doomed() -> None:
        starts.append(1)
        renew()
        os.kill(train_workers()[1]["Pid"], signal.SIGKILL)

    monkeypatch.setattr(two, "renew_server", doomed)
    os.kill(train_workers()[1]["Pid"], signal.SIGKILL)
    with pytest.raises(ServerLost, match=r"rank [01]: The actor died"):
        list(finished_rounds(federation))
    assert len(starts) == LOSSES
    monkeypatch.undo()
    two.renew_server()


@pytest.mark.long
def test_what_a_worker_refuses_is_one_line(experiment: Experiment) -> None:
    """Whether it is asked first or warm; then the workers leave the reservation to others."""
    wrong, before = experiment.with_values({"model.name": "/nowhere"}), fits()
    with reserve(wrong) as group:
        with pytest.raises(AssetError) as error:
            ray_backend(wrong, group)
        assert str(error.value.cause) == "/nowhere: no such file or folder"
        assert fits() == before
        backend = ray_backend(experiment, group)
        with pytest.raises(AssetError, match="no such file or folder"):
            backend.begin(wrong)
        assert fits() == before
        with closing(ray_backend(experiment, group)) as backend:
            assert len(backend.examples()) == 8


def test_why_a_training_ended() -> None:
    """A refusal, on whichever rank, is the user's to mend; else the first that is gone."""
    refused = WorkerGroupError("...", {0: RuntimeError("closed"), 1: AssetError("no such file")})
    found = _why(refused)
    assert type(found).__name__ == "UserError"
    assert str(found) == "rank 1: no such file"
    dead = WorkerHealthCheckFailedError("...", failure=RuntimeError("The actor died.\nclass_name"))
    lost = _why(WorkerGroupError("...", {0: RuntimeError("closed"), 1: dead}))
    assert isinstance(lost, RankLost)
    assert str(lost) == "rank 1: The actor died."
    assert str(_why(WorkerGroupError("...", {0: RuntimeError("wrong\nso")}))) == "rank 0: wrong"
    assert str(_why(ControllerError(RuntimeError("no room")))) == "no room"


def test_a_trial_reserves_what_its_workers_take(on_two: Experiment) -> None:
    each = {"CPU": 0.5}
    assert bundles(on_two) == [each, each]
    assert trial_resources(on_two).bundles == [each, each]
    never = on_two.with_values({"server.num_workers": 99})
    with pytest.raises(PlacementError, match=r"requires 49.5 CPU \(server: 99"):
        check_fits(bundles(never), never.server.num_workers)
