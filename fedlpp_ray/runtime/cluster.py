"""Connecting to Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

ENVIRONMENT = {
    # Threads that spin while they wait take the cores from the actors that work.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # cuBLAS is deterministic only with a fixed workspace, set before CUDA starts.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set in every actor."""


@contextmanager
def connect() -> Iterator[None]:
    """A Ray cluster for the time of the block.

    The one that RAY_ADDRESS names (a submitted job has it), or else a private one on this machine,
    which ends with the block.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(
        address=address,
        runtime_env={"env_vars": ENVIRONMENT},
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({"include_dashboard": False} if address == "local" else {}),
    )
    try:
        yield
    finally:
        ray.shutdown()
