"""Connecting to Ray."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from fedlpp_ray.config import RuntimeConfig
from fedlpp_ray.errors import UserError

CONNECT_SECONDS = 10.0


class ClusterError(UserError):
    """There is no Ray cluster where one was named."""


@contextmanager
def connect(runtime: RuntimeConfig | None = None) -> Iterator[None]:
    """A Ray cluster for the time of the block.

    The one that RAY_ADDRESS names (a submitted job has it), or else a private one on this machine,
    which ends with the block. Every process of the job has `runtime.environment` from its start.

    Args:
        runtime: Threads of each actor; of a sweep those of its base.

    Raises:
        ClusterError: no cluster answers at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    _check_answers(address)
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": (runtime or RuntimeConfig()).environment},
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except ConnectionError as error:
        raise ClusterError(f"RAY_ADDRESS = '{address}': {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes for an address where nothing listens."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"RAY_ADDRESS = '{address}': nothing answers there ({error})") from None
