"""Ray actors: in the right places, on what a cluster can give, and nothing left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.util.placement_group import placement_group_table

from fedlpp_ray.assets import AssetError
from fedlpp_ray.config import Experiment, RuntimeConfig
from fedlpp_ray.federation import Federation, checkpoint
from fedlpp_ray.federation.in_process import InProcess, in_process
from fedlpp_ray.runtime import (
    PlacementError,
    RayBackend,
    bundles,
    check_fits,
    connect,
    ray_backend,
    reserve,
)
from fedlpp_ray.runtime.trial import trial_resources
from tests.federation.test_loop import numbers
from tests.runtime.test_rounds import LASTING


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connect():
        yield


@pytest.mark.slow
def test_no_actor_and_no_reservation_is_left(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"federation.rounds": 1})
    with reserve(experiment) as group, closing(RayBackend(experiment, group)) as backend:
        list(Federation(experiment, backend).run())
    for _ in range(50):
        actors = ray._private.state.actors().values()
        alive = [actor for actor in actors if actor["State"] != "DEAD"]
        free = ray.available_resources().get("CPU")
        if not alive and free == ray.cluster_resources()["CPU"]:
            break
        time.sleep(0.2)
    assert alive == []
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    assert free == ray.cluster_resources()["CPU"]


@pytest.mark.slow
def test_each_actor_has_its_own_bundle(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"runtime.client_actors": 2})
    assert bundles(experiment) == [{"CPU": 0.5}] * 3
    with reserve(experiment) as group, closing(RayBackend(experiment, group)):
        assert group.bundle_count == 3
        free = ray.available_resources()
        # All that was reserved is taken: one actor a bundle.
        for index in range(3):
            assert free.get(f"CPU_group_{index}_{group.id.hex()}", 0) == 0


@pytest.mark.slow
def test_actors_go_on_with_a_broadcast_that_lasts(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    """Interrupted in one process after round 2 of 3 that share a broadcast."""
    experiment = tiny_experiment.with_values(LASTING)
    federation = Federation(experiment, InProcess(experiment))
    rounds = federation.run()
    next(rounds)
    next(rounds)
    checkpoint.save(federation, tmp_path)
    list(rounds)
    with reserve(experiment) as group, closing(RayBackend(experiment, group)) as backend:
        restored = Federation(experiment, backend)
        checkpoint.restore(restored, tmp_path)
        list(restored.run())
    assert numbers(restored.history) == numbers(federation.history)


def test_resources_follow_from_the_experiment() -> None:
    experiment = Experiment().with_values(
        {
            "federation.clients": 10,
            "federation.client_fraction": 0.3,
            "runtime.client_actors": 8,
            "runtime.client_cpus": 1.0,
            "runtime.client_gpus": 0.25,
            "runtime.server_gpus": 1.0,
        }
    )
    client = {"CPU": 1.0, "GPU": 0.25}
    # No more actors than a cohort of 3 has clients.
    assert bundles(experiment) == [{"CPU": 0.5, "GPU": 1.0}, client, client, client]
    factory = trial_resources(experiment)
    assert factory.head_bundle_is_empty
    assert factory.bundles == bundles(experiment)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"runtime.client_actors": 99}, r"requires 10.5 CPU \(server: 1, client actors: 20\)"),
        (
            {"runtime.client_cpus": 64.0},
            r"one actor requires 64 CPU; no node has that, the largest has \d",
        ),
        ({"runtime.client_gpus": 1.0}, r"requires 0.5 CPU and 1 GPU; .* and 0 GPU"),
    ],
)
def test_what_the_cluster_can_never_give_is_refused_at_once(
    values: dict[str, object], words: str
) -> None:
    fixed = {"federation.clients": 20, "federation.client_fraction": 1.0}
    experiment = Experiment().with_values(fixed | values)
    start = time.monotonic()
    with pytest.raises(PlacementError, match=words) as error, reserve(experiment):
        pass
    assert time.monotonic() - start < 2
    assert "Lower runtime.client_actors" in str(error.value)


def test_the_autoscalers_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        resources: dict[str, float] = {"CPU": 32, "GPU": 4}  # noqa: RUF012
        max_count = 2

    state = ray._private.state.state
    config = SimpleNamespace(node_group_configs=[Group()])
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    check_fits([{"CPU": 30, "GPU": 1.0}] * 2)
    with pytest.raises(PlacementError, match="the cluster has 8"):
        check_fits([{"CPU": 1, "GPU": 1.0}] * 9)
    # A node with the CPUs and another with the GPU do not make one that has both.
    Group.resources = {"CPU": 1, "GPU": 4}
    with pytest.raises(PlacementError, match=r"requires 2 CPU and 0.5 GPU; no node has that"):
        check_fits([{"CPU": 2, "GPU": 0.5}])


@pytest.mark.parametrize(
    ("server", "clients", "nodes", "room"),
    [
        # Two GPUs have 2 GPUs of shares, but room for two shares of .6, not three.
        ({"CPU": 1}, [{"CPU": 1, "GPU": 0.6}] * 3, [{"CPU": 16, "GPU": 2}], 2),
        ({"CPU": 1}, [{"CPU": 1, "GPU": 0.5}] * 4, [{"CPU": 16, "GPU": 2}], 4),
        ({"CPU": 1}, [{"CPU": 1, "GPU": 1 / 3}] * 3, [{"CPU": 16, "GPU": 1}], 3),
        # The server's share leaves less than a client's on its GPU.
        ({"CPU": 1, "GPU": 0.2}, [{"CPU": 1, "GPU": 0.9}] * 2, [{"CPU": 16, "GPU": 3}], 2),
        ({"CPU": 1, "GPU": 0.2}, [{"CPU": 1, "GPU": 0.9}] * 2, [{"CPU": 16, "GPU": 2}], 1),
        ({"CPU": 1, "GPU": 0.5}, [{"CPU": 1, "GPU": 0.25}] * 6, [{"CPU": 16, "GPU": 2}], 6),
        # Ray counts exactly: twenty times 0.1 is 2, whatever floats make of it.
        ({"CPU": 0.1}, [{"CPU": 0.1}] * 19, [{"CPU": 2}], 19),
        # The server goes where it leaves most room.
        ({"CPU": 1}, [{"CPU": 2}] * 3, [{"CPU": 4}, {"CPU": 3}], 3),
        ({"CPU": 2}, [{"CPU": 2}] * 3, [{"CPU": 3}, {"CPU": 3}, {"CPU": 3}], 2),
    ],
)
def test_bundles_that_no_layout_can_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    server: dict[str, float],
    clients: list[dict[str, float]],
    nodes: list[dict[str, float]],
    room: int,
) -> None:
    total = {key: sum(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    if room == len(clients):
        check_fits([server, *clients])
    else:
        with pytest.raises(PlacementError, match=f"{len(clients)} client.* room for {room} "):
            check_fits([server, *clients])


def test_no_room_in_time_is_said(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values(
        {"runtime.client_cpus": 1.5, "runtime.client_actors": 1, "runtime.start_timeout": 2.0}
    )
    with (
        reserve(experiment.with_values({"runtime.start_timeout": 60.0})),
        pytest.raises(PlacementError, match=r"no room after 2 s .*required"),
        reserve(experiment),
    ):
        pass


@pytest.mark.slow
def test_an_actor_that_cannot_start_says_why(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"model.name": "/nowhere"})
    with (
        pytest.raises(AssetError, match="no such file or folder"),
        reserve(experiment) as group,
    ):
        RayBackend(experiment, group)


@pytest.mark.slow
def test_a_client_alone_is_one_actor(tiny_experiment: Experiment, tmp_path: Path) -> None:
    experiment = tiny_experiment.with_values({"method": "local-only", "federation.rounds": 2})
    assert len(bundles(experiment)) == 1
    here = in_process(experiment)
    expected = numbers(list(Federation(experiment, here).run()))
    with reserve(experiment) as group:
        with closing(ray_backend(experiment, group)) as backend:
            federation = Federation(experiment, backend)
            rounds = federation.run()
            next(rounds)
            checkpoint.save(federation, tmp_path)
            assert backend.measure_floor() == here.measure_floor()
        with closing(ray_backend(experiment, group)) as backend:
            federation = Federation(experiment, backend)
            checkpoint.restore(federation, tmp_path)
            list(federation.run())
            assert numbers(federation.history) == expected


def test_every_process_has_its_environment_from_its_start() -> None:
    """Libraries read it when they are imported, so setting it later would not do."""

    @ray.remote(num_cpus=0.5)
    def environment() -> dict[str, str]:
        items = Path("/proc/self/environ").read_text(encoding="utf-8").split("\0")
        return dict(item.split("=", 1) for item in items if "=" in item)

    expected = RuntimeConfig().environment
    assert expected["OMP_NUM_THREADS"] == "1"
    assert expected["OMP_WAIT_POLICY"] == "PASSIVE"
    assert expected.items() <= ray.get(environment.remote()).items()
