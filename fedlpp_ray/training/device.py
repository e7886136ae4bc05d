"""Settings of a process that computes."""

from __future__ import annotations

import os

import torch

from fedlpp_ray.errors import UserError


def configure_torch(threads: int, gpus: float) -> torch.device:
    """Fix the thread count, ask for deterministic kernels, and choose the device.

    A share of a GPU is only bookkeeping for Ray; here it becomes a cap on this process's memory.

    Args:
        threads: Torch threads; sums in another number of threads may give other bits.
        gpus: 0 for the CPU, a share below 1, or 1.

    Raises:
        UserError: a GPU is asked for and CUDA is not available.
    """
    torch.set_num_threads(threads)
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"{gpus} GPU is asked for (runtime.client_gpus or server_gpus), but CUDA is not "
            "available here; set both to 0 to run on the CPU"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)
    return torch.device("cuda")
