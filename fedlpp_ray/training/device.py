"""Settings of a process that computes."""

from __future__ import annotations

import logging
import os
import resource
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from fedlpp_ray.errors import UserError

logger = logging.getLogger(__name__)

_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
"""What torch calls a processor's products in bf16, on x86 and on Arm."""


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in: bf16 where its frozen tensors are stored in it, else fp32."""
    stored = {parameter.dtype for parameter in model.parameters()}
    return torch.bfloat16 if torch.bfloat16 in stored else torch.float32


def computing(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """In the block, models compute in this `compute_dtype`; warns once of a slow processor."""
    if dtype == torch.float32:
        return nullcontext()
    _warn_of_emulation(device.type)
    return torch.autocast(device.type, dtype)


@cache
def _warn_of_emulation(kind: str) -> None:
    if not has_bf16(kind):
        logger.warning(
            "client.compute 'bf16': this %s has no instructions for it; the numbers are the same, "
            "but it may be slower than 'fp32'",
            "GPU" if kind == "cuda" else "processor",
        )


def has_bf16(kind: str) -> bool:
    """Whether this GPU (`cuda`) or processor multiplies in bf16; True where torch cannot tell."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ask = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    return ask is None or any(ask().get(name) for name in _BF16)


def configure_torch(threads: int, gpus: float) -> torch.device:
    """Fix the thread count, ask for deterministic kernels, and choose the device.

    The thread count holds in every thread of the process that computes after this call. Threads
    between operations are not used here, and limited to one. A share of a GPU is only bookkeeping
    for Ray; here it becomes a cap on this process's memory.

    Args:
        threads: Torch threads; sums in another number of threads may give other bits.
        gpus: 0 for the CPU, a share below 1, or 1.

    Raises:
        UserError: a GPU is asked for and CUDA is not available.
    """
    torch.set_num_threads(threads)
    with suppress(RuntimeError):  # it can be set once in a process, before work is split
        torch.set_num_interop_threads(1)
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


def process_peak() -> int:
    """Bytes that this process has needed at most: of its GPU if it uses one, else of the machine.

    On a GPU: what torch's allocator reserved, without CUDA's own context. On the CPU: the largest
    resident set, in which pages of mapped files count although processes share them.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_reserved()
    # A process that was just started reports its parent's in ru_maxrss; this is its own.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
