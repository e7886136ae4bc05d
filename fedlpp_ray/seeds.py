"""Random numbers that depend on what they are for, never on who draws them or when.

Every draw of an experiment gets its own generator, seeded from the experiment's seed and the names
of its purpose (for instance "local", round, client). So the same experiment gives the same bits
whatever the number of processes, the order in which they finish, or an interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose`, e.g. `derive(0, "local", round, client)`."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def global_seed(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the block (for libraries that use them), then restore.

    The CUDA generator of the current device is covered too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, *purpose))
        yield
