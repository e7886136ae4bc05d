"""The device of a process: a share of a GPU is capped, and a GPU that is not there is refused."""

from __future__ import annotations

import pytest
import torch

from fedlpp_ray.errors import UserError
from fedlpp_ray.training import configure_torch


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine that says it has CUDA and remembers the caps that it is given."""
    caps: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    return caps


@pytest.mark.parametrize(("gpus", "expected"), [(0.25, [0.25]), (1.0, [])])
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
