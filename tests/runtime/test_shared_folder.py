"""A folder for results that the nodes do not share is refused before the first trial."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.runtime import connect, shared_folder
from fedlpp_ray.runtime.shared_folder import StorageError, check_shared
from fedlpp_ray.runtime.space import load_space
from fedlpp_ray.runtime.sweep import run_sweep
from tests.runtime.many_nodes import many_nodes

SPACE = """
from ray import tune

base = "tiny.yaml"
param_space = {"lora.rank": tune.grid_search([2, 4])}
objectives = {"server/accuracy": "max"}
"""


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of this node, with an autoscaler that may start four more."""
    config = SimpleNamespace(
        node_group_configs=[SimpleNamespace(resources={"CPU": 8.0}, max_count=4)]
    )
    with connect():
        state = ray._private.state.state
        monkeypatch.setattr(state, "get_cluster_config", lambda: config)
        yield


@pytest.mark.slow
def test_a_machine_alone_shares_with_itself(tmp_path: Path) -> None:
    with connect():
        check_shared(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("grows")
def test_nodes_to_come_need_a_file_system_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for storage in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(StorageError, match=r"disk of this node alone \(.*give s3://"):
            check_shared(storage)
    check_shared("s3://bucket/sweeps")
    monkeypatch.setattr(shared_folder, "_kind", lambda _: "nfs4")
    check_shared(str(tmp_path))


def test_the_kind_of_a_file_system_is_that_of_its_mount() -> None:
    assert shared_folder._kind(Path("/proc/self")) == "proc"
    assert shared_folder._kind(Path("/")) not in shared_folder.NETWORK | {"unknown"}


@pytest.mark.long
def test_every_node_is_asked_before_a_trial_starts(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_experiment(tiny_experiment, "tiny", "x"))
    (tmp_path / "space.py").write_text(SPACE)
    with many_nodes() as nodes:
        nodes.add(2)
        with connect():
            check_shared(str(tmp_path))
            assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
            # A path that is another folder, or none, in the processes of the other node.
            folder = os.open(tmp_path, os.O_RDONLY)
            try:
                with pytest.raises(StorageError, match="not the same folder on"):
                    run_sweep(load_space(tmp_path / "space.py"), f"/proc/self/fd/{folder}", [])
            finally:
                os.close(folder)
