"""Results on the disk of one node are lost to the others: refused before anything is computed."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import compress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlpp_ray.errors import UserError
from fedlpp_ray.runtime.growth import growth

ANSWER_SECONDS = 60.0
NETWORK = frozenset(
    (
        *("9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre"),
        *("nfs", "nfs4", "ocfs2", "smb3", "wekafs"),
    )
)
"""File systems that several machines can mount, as /proc/self/mounts names them; and fuse.*."""


class StorageError(UserError):
    """The nodes of the cluster do not share the folder for results."""


def check_shared(storage: str) -> None:
    """Refuse a local folder that the nodes of the connected cluster do not share.

    Every node looks for a file written here. Of nodes that an autoscaler has
    yet to start, only the kind of file system can tell.

    Args:
        storage: Folder or URI (s3://...); only a folder and file:// are looked at.

    Raises:
        StorageError: naming the folder and the nodes.
    """
    local = storage.removeprefix("file://")
    if "://" in local:
        return
    folder = Path(local).absolute()
    others, more = _other_nodes(), growth()
    grows = more is not None and bool(more.kinds)
    if not others and not grows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if blind := _without(folder, others):
        raise StorageError(f"--storage {storage}: not the same folder on {blind}. {_ADVICE}")
    if grows and not others and (kind := _kind(folder)) not in NETWORK:
        raise StorageError(
            f"--storage {storage}: on a disk of this node alone ({kind}), and the cluster starts "
            f"others for the trials. {_ADVICE}"
        )


_ADVICE = (
    "A trial keeps its checkpoints where it runs, so they would be lost; give s3://... (or gs://), "
    "or a folder that every node has at the same path"
)


def _other_nodes() -> dict[str, str]:
    """Nodes besides this one, id to address. A trial's function may be on any: it takes no CPU."""
    here = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    }


def _without(folder: Path, nodes: dict[str, str]) -> str:
    """Addresses of the nodes that do not see a file made here; one that is lost is left out."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".shared-") as file:
        path = str(folder / Path(file.name).name)

        def sees() -> bool:  # nested, so that it travels by value: the node imports nothing of ours
            return os.path.exists(path) and os.access(os.path.dirname(path), os.W_OK)

        ask = ray.remote(num_cpus=0, max_retries=1)(sees)
        answers = [ask.options(scheduling_strategy=_on(node)).remote() for node in nodes]
        until = time.monotonic() + ANSWER_SECONDS
        denied = [_denied(answer, until - time.monotonic()) for answer in answers]
    return ", ".join(compress(nodes.values(), denied))


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _denied(answer: Any, seconds: float) -> bool:
    try:
        return not ray.get(answer, timeout=max(0.0, seconds))
    except RayError:  # gone, or too busy to answer: no reason to refuse the folder
        return False


def _kind(folder: Path) -> str:
    """The kind of file system of a folder; nfs for all of FUSE, which is mostly a network's."""
    real, found, length = folder.resolve(), "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split(" ")
        point = Path(mount.replace("\\040", " "))
        if real.is_relative_to(point) and len(point.parts) >= length:
            found, length = kind, len(point.parts)
    return "nfs" if found.startswith("fuse.") else found
