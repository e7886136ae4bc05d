"""What the command lines share."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console

from fedlpp_ray.errors import UserError

BAD_INPUT = 2


def run_command(command: Callable[[], int], console: Console) -> int:
    """Run a command; a fault that the user can mend becomes one red line, not a traceback.

    Returns:
        The command's exit status, or `BAD_INPUT`.
    """
    try:
        return command()
    except UserError as error:
        reason = getattr(error, "cause", error)  # from an actor, Ray adds the traceback there
        console.print(f"error: {reason}", style="red", markup=False)
        return BAD_INPUT


class StopSignal:
    """Has SIGTERM stop the block as Ctrl-C does, by KeyboardInterrupt.

    Attributes:
        status: The exit status that tells which of them it was: 130 or 143.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGINT

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGTERM)
        self.listen()
        return self

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def listen(self) -> None:
        """Take the signal (again: a library may have taken it over)."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.status = 128 + number
        raise KeyboardInterrupt


def check_writable_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        UserError: naming the option.
    """
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}") from None
    if new:
        path.unlink()


def check_writable_folder(option: str, path: Path) -> None:
    """Make a folder, and refuse one in which nothing could be written.

    Raises:
        UserError: naming the option.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be made a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{option} {path}: nothing can be written there")
