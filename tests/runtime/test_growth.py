"""What an autoscaler may start, from the places where Ray says it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from fedlpp_ray.runtime import PlacementError, connect
from fedlpp_ray.runtime import growth as room
from fedlpp_ray.runtime.growth import launched
from fedlpp_ray.runtime.placement import check_fits

LAUNCHED: dict[str, Any] = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "small": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        "large": {"resources": {"CPU": 32, "GPU": 4}, "max_workers": 9},
        "none": {"resources": {"CPU": 99}, "max_workers": 0},
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect():
        yield


@pytest.fixture
def autoscaler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cluster: None) -> Path:
    """An autoscaler that says no more than that it runs; returns where `ray up` has its file."""
    reply = GetClusterStatusReply()
    reply.autoscaling_state.SetInParent()
    status = type("Client", (), {"get_cluster_status": lambda *_, **__: reply.SerializeToString()})
    monkeypatch.setattr(ray._private.worker.global_worker, "gcs_client", status())
    monkeypatch.setattr(room, "LAUNCHED", tmp_path / "ray_bootstrap_config.yaml")
    return tmp_path / "ray_bootstrap_config.yaml"


def test_the_file_of_ray_up_limits_kinds_and_all_together() -> None:
    growth = launched(LAUNCHED)
    assert growth.kinds == (({"CPU": 8, "GPU": 1}, 2), ({"CPU": 32, "GPU": 4}, 3))
    assert growth.total() == {"CPU": 96, "GPU": 12}  # three large ones


def test_machines_of_ones_own_have_what_nobody_has_said() -> None:
    kind = {"local.cluster.node": {"resources": {}, "node_config": {}, "max_workers": 2}}
    own = {"max_workers": 2, "head_node_type": "local.cluster.node", "available_node_types": kind}
    assert launched(own).kinds == ((room.UNKNOWN, 2),)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_without_an_autoscaler_nothing_grows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "left_over.yaml").write_text(yaml.safe_dump(LAUNCHED))
    monkeypatch.setattr(room, "LAUNCHED", tmp_path / "left_over.yaml")
    assert room.growth() is None
    with pytest.raises(PlacementError, match="no node has that"):
        check_fits([{"CPU": 8, "GPU": 1.0}])


def test_a_run_may_wait_for_the_nodes_of_ray_up(autoscaler: Path) -> None:
    autoscaler.write_text(yaml.safe_dump(LAUNCHED))
    check_fits([{"CPU": 8, "GPU": 1.0}] * 12)
    with pytest.raises(PlacementError, match="the cluster has 12"):
        check_fits([{"CPU": 1, "GPU": 1.0}] * 13)
    with pytest.raises(PlacementError, match="no node has that"):
        check_fits([{"CPU": 33}])


def test_a_run_is_not_refused_where_nobody_knows_the_limits(autoscaler: Path) -> None:
    assert not autoscaler.exists()  # as on Kubernetes
    check_fits([{"CPU": 8, "GPU": 1.0}] * 20)
