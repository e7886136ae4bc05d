"""Processes that are the ranks of one party, for tests of what they do together without Ray.

And what such tests set, and how they compare runs.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import multiprocessing

WHOLE = {"stage3_param_persistence_threshold": 0}
"""Small tensors are spread too: DeepSpeed leaves those below 100,000 numbers whole."""
SERVER = {"server.zero.stage": 3, **{f"server.zero.{key}": n for key, n in WHOLE.items()}}
CLIENT = {"client.zero.stage": 3, **{f"client.zero.{key}": n for key, n in WHOLE.items()}}
STAGE_2 = {"server.zero.stage": 2}
TUNED = {"server.examples": 21, "server.tune_steps": 3, "server.tune_lr": 1e-2}
"""A server that trains."""
FINISHED = TUNED | {"server.final_average": 2, "server.final_tune_steps": 2}
"""And at the end makes a model of its own."""


class Ranks:
    """So many processes in one group of torch.distributed.

    Args:
        size: Number of ranks.
        folder: Where they meet.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(self._size)]
        self._pipes = [ours for ours, _ in pairs]
        meeting = f"file://{self._folder / uuid4().hex}"
        self._processes = [
            context.Process(target=_serve, args=(rank, self._size, meeting, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()  # so that the end of a process is the end of its pipe

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have every rank call `function(group, *arguments)`; returns their results.

        Where one fails the others may wait for it: all are ended, and others begin with the next.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[Any, Any] = {}
        while len(results) < len(self._pipes):
            ready: list[Any] = connection.wait([p for p in self._pipes if p not in results])
            for pipe in ready:
                failed, results[pipe] = _received(pipe)
                if failed:
                    self.close()
                    raise AssertionError(results[pipe])
        return [results[pipe] for pipe in self._pipes]

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _received(pipe: Any) -> tuple[bool, Any]:
    """Whether a rank failed, and what it returned, or why it failed."""
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return True, "a rank ended"


def _serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from fedlpp_ray.training import Group

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    group = Group.joined()
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((False, function(group, *arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Whether two runs differ in numbers by at most so much, and in digests alone otherwise."""
    if isinstance(expected, dict):
        keys = expected.keys() - {"digest"}
        return keys == found.keys() - {"digest"} and all(
            close(found[key], expected[key], tolerance) for key in keys
        )
    if isinstance(expected, list):
        pairs = zip(found, expected, strict=True)
        return all(close(*pair, tolerance) for pair in pairs)
    if isinstance(expected, float):
        return bool(abs(found - expected) <= tolerance * max(1.0, abs(expected)))
    return bool(found == expected)
