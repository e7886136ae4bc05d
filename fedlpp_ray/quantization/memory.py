"""Fresh memory for large results, in huge pages where the system offers them.

An allocation that malloc must fetch from the kernel costs one page fault for every 4 KiB, which on
a virtual machine takes ten times longer than filling it; 2 MiB pages take that away.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_LARGE = 32 << 20
"""Bytes from which glibc maps fresh pages for every allocation instead of reusing freed ones."""


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like ``torch.empty(numel)``; the content is arbitrary."""
    size = numel * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numel, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones will do
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)
