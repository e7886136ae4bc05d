"""The device of a process: a share of a GPU is capped, and a GPU that is not there is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedlpp_ray.errors import UserError
from fedlpp_ray.training import configure_torch, process_peak


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine that says it has CUDA and remembers the caps that it is given."""
    caps: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    return caps


@pytest.mark.parametrize(("gpus", "expected"), [(0.25, [0.25]), (1 / 3, [1 / 3]), (1.0, [])])
def test_a_share_of_a_gpu_caps_its_memory(
    cuda: list[float], gpus: float, expected: list[float]
) -> None:
    assert configure_torch(1, gpus) == torch.device("cuda")
    assert cuda == expected


def test_the_cpu_needs_no_cap(cuda: list[float]) -> None:
    assert configure_torch(1, 0) == torch.device("cpu")
    assert cuda == []


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"0.5 GPU.*runtime.client_gpus.*set both to 0"):
        configure_torch(1, 0.5)


@pytest.mark.slow
def test_the_peak_is_of_this_process_alone() -> None:
    """ru_maxrss of a new process is at first its parent's."""
    ballast = bytearray(b"\1" * (700 << 20))
    code = (
        "from fedlpp_ray.training.device import process_peak as p; a = p(); "
        "x = b'1' * (200 << 20); print(a >> 20, p() - a >> 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    peak, more = map(int, done.stdout.split())
    assert peak < len(ballast) >> 20
    assert 190 <= more <= 260


def test_the_peak_on_a_gpu_is_the_allocators(
    cuda: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    assert process_peak() == 7


@pytest.mark.slow
def test_threads_hold_in_every_thread_of_a_process() -> None:
    code = (
        "import threading, torch; from fedlpp_ray.training import configure_torch as c; c(3, 0); "
        "f = lambda: print(torch.get_num_threads(), torch.get_num_interop_threads()); "
        "f(); t = threading.Thread(target=f); t.start(); t.join()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["3", "1", "3", "1"]
