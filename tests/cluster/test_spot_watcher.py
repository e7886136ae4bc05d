"""The watcher against a metadata service of its own, with a stand-in for `ray` and with Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_watcher.py"


class Metadata(BaseHTTPRequestHandler):
    """What both clouds answer a node that asks about itself; `notice` is set by the tests."""

    notice: str | None = None
    preempted = "FALSE"
    failures = 0
    """How many requests are still to be answered with an error."""

    def do_PUT(self) -> None:
        seconds = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        found = self.path == "/latest/api/token" and seconds is not None
        self.answer(200 if found else 400, "a-token")

    def do_GET(self) -> None:
        if Metadata.failures:
            Metadata.failures -= 1
            self.answer(503, "")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            right = self.headers["Metadata-Flavor"] == "Google"
            self.answer(200 if right else 403, Metadata.preempted)
        elif self.headers["X-aws-ec2-metadata-token"] != "a-token":
            self.answer(401, "")  # as with HttpTokens: required
        elif self.path == "/latest/meta-data/spot/instance-action" and Metadata.notice:
            self.answer(200, Metadata.notice)
        else:
            self.answer(404, "")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    Metadata.notice, Metadata.preempted, Metadata.failures = None, "FALSE", 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{host}")
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be used
    yield Metadata
    server.shutdown()
    server.server_close()


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_watcher", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    return module


def ec2_notice(seconds: float) -> str:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_ec2_without_and_with_a_notice(metadata: type[Metadata], watcher: ModuleType) -> None:
    assert watcher.aws_seconds_left() is None
    metadata.notice = ec2_notice(120)
    assert 100 < watcher.aws_seconds_left() <= 120


def test_compute_engine_without_and_with_a_notice(
    metadata: type[Metadata], watcher: ModuleType
) -> None:
    assert watcher.gcp_seconds_left() is None
    metadata.preempted = "TRUE\n"
    assert watcher.gcp_seconds_left() == 30


class Ray:
    """Stands for `ray`: writes its arguments down, and fails as often as told."""

    def __init__(self, folder: Path, failures: int = 0) -> None:
        self.log, self.path = folder / "calls", folder / "ray"
        self.path.write_text(
            f'#!/bin/sh\necho "$@" >> "{self.log}"\n[ $(wc -l < "{self.log}") -gt {failures} ]\n'
        )
        self.path.chmod(0o755)
        self.command = [str(self.path), "drain-node", "--address=head:6379"]

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def test_nothing_is_drained_before_the_notice(
    metadata: type[Metadata], watcher: ModuleType, tmp_path: Path
) -> None:
    ray, asked = Ray(tmp_path), 0

    def seconds_left() -> float | None:
        nonlocal asked
        asked += 1
        assert ray.calls == []
        if asked == 3:
            metadata.notice = ec2_notice(120)
        left: float | None = watcher.aws_seconds_left()
        return left

    watcher.watch(seconds_left, ray.command)
    (call,) = ray.calls
    assert call.startswith("drain-node --address=head:6379 --reason=DRAIN_NODE_REASON_PREEMPTION")
    assert 100 < int(call.partition("--deadline-remaining-seconds=")[2]) <= 120
    assert asked == 3


def test_a_service_that_fails_is_asked_again(
    metadata: type[Metadata],
    watcher: ModuleType,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata.failures, metadata.notice = 2, ec2_notice(120)
    ray = Ray(tmp_path)
    watcher.watch(watcher.aws_seconds_left, ray.command)
    assert len(ray.calls) == 1
    assert caplog.text.count("no answer from the metadata service") == 2


@pytest.mark.parametrize("text", ["not JSON", "[]", "{}", '{"time": "soon"}', '{"time": 7}'])
def test_a_notice_that_cannot_be_read_is_asked_for_again(
    metadata: type[Metadata], watcher: ModuleType, tmp_path: Path, text: str
) -> None:
    metadata.notice = text
    ray, asked = Ray(tmp_path), 0

    def seconds_left() -> float | None:
        nonlocal asked
        asked += 1
        left: float | None = watcher.aws_seconds_left() if asked == 1 else 60.0
        return left

    watcher.watch(seconds_left, ray.command)
    assert len(ray.calls) == 1


def test_a_drain_that_fails_is_tried_again_and_never_with_a_negative_deadline(
    metadata: type[Metadata], watcher: ModuleType, tmp_path: Path
) -> None:
    metadata.notice = ec2_notice(-10)
    ray = Ray(tmp_path, failures=2)
    watcher.watch(watcher.aws_seconds_left, ray.command)
    assert len(ray.calls) == 3
    assert all(call.endswith("--deadline-remaining-seconds=0") for call in ray.calls)


def test_a_missing_ray_does_not_end_the_watch(watcher: ModuleType, tmp_path: Path) -> None:
    ray = Ray(tmp_path)
    commands = iter([["/no/such/ray"], ray.command])

    def seconds_left() -> float:
        command[:] = next(commands)
        return 60.0

    command: list[str] = []
    watcher.watch(seconds_left, command)
    assert len(ray.calls) == 1


def test_the_command_line(metadata: type[Metadata], tmp_path: Path) -> None:
    metadata.preempted = "TRUE"
    ray = Ray(tmp_path)
    done = subprocess.run([sys.executable, SCRIPT, "gcp", *ray.command], check=False, timeout=60)
    assert done.returncode == 0
    assert ray.calls[0].endswith("--deadline-remaining-seconds=30")
    for wrong in (["azure", "ray"], ["aws"], []):
        done = subprocess.run(
            [sys.executable, SCRIPT, *wrong], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "usage" in done.stderr


@pytest.mark.long
def test_a_notice_drains_the_node_of_a_real_cluster(
    metadata: type[Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a task runs there; the task ends all the same, and new ones go elsewhere."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        spot = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)

        @ray.remote(num_cpus=1, max_retries=0)
        def node(seconds: float) -> str:
            time.sleep(seconds)
            return str(ray.get_runtime_context().get_node_id())

        pinned = NodeAffinitySchedulingStrategy(spot.node_id, soft=False)
        running = node.options(scheduling_strategy=pinned).remote(20.0)
        metadata.notice = ec2_notice(100)
        drain = ["drain-node", f"--address={cluster.address}", f"--node-id={spot.node_id}"]
        done = subprocess.run(
            [sys.executable, SCRIPT, "aws", str(Path(sys.executable).with_name("ray")), *drain],
            env=os.environ,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0
        state = ray._private.state.state
        until(lambda: spot.node_id in state.get_draining_nodes())
        elsewhere = ray.get([node.remote(0.0) for _ in range(3)], timeout=60)
        assert spot.node_id not in elsewhere
        assert ray.get(running, timeout=60) == spot.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
