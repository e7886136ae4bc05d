"""Runs in a process of their own: a long one, and one whose calls fail on their way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from tests.federation.test_loop import numbers

pytestmark = pytest.mark.long

MEGABYTES = 4.0
"""Growth between rounds 100 and 200 that is no leak; measured: 1."""
COUNTS = ("waited for", "references")
LOST = {"num_failures": 2, "req_failure_prob": 25, "resp_failure_prob": 25}
"""No more in the driver than runtime.attempts and recovery.LOSSES make good."""
HARMLESS = {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20}
FAILURES = {
    "CoreWorkerService.grpc_client.PushTask": LOST,
    # Ray itself makes these good.
    "NodeManagerService.grpc_client.RequestWorkerLease": HARMLESS,
    "CoreWorkerService.grpc_client.GetObjectStatus": HARMLESS,
}


def run(values: dict[str, object], **environment: str) -> tuple[dict[str, Any], str]:
    """What `tests.runtime.soak` prints, and what it says meanwhile."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.soak", json.dumps(values)],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


def in_this_process(values: dict[str, object]) -> list[dict[str, object]]:
    experiment = Experiment().with_values(values)
    history = numbers(list(Federation(experiment, InProcess(experiment)).run()))
    return json.loads(json.dumps(history))  # type: ignore[no-any-return]


def test_two_hundred_rounds_take_no_more_memory_and_leave_nothing(
    tiny_values: dict[str, object],
) -> None:
    values = tiny_values | {
        "federation.rounds": 200,
        "federation.local_steps": 1,
        "evaluation.every": 50,
        "runtime.client_actors": 2,
    }
    found, _ = run(values)
    assert found["left"] == []
    assert len(found["history"]) == 200
    *_, middle, _, last = found["samples"]
    assert len(found["samples"]) == 4
    assert set(last) >= {"driver", "server", "client 0", "client 1"}
    grown = {name: last[name] - middle[name] for name in last if name not in COUNTS}
    assert max(grown.values()) < MEGABYTES, grown
    assert all(each[name] <= 32 for each in found["samples"] for name in COUNTS)


def test_calls_that_fail_on_their_way_change_no_bit(tiny_values: dict[str, object]) -> None:
    values = tiny_values | {"runtime.client_actors": 2, "runtime.start_timeout": 200.0}
    found, said = run(values, RAY_testing_rpc_failure=json.dumps(FAILURES))
    assert found["history"] == in_this_process(values)
    assert found["left"] == []
    assert "WARNING:fedlpp_ray.runtime" in said or "WARNING:fedlpp_ray.federation" in said
