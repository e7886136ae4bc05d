"""What the command lines share."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console

from fedlpp_ray.errors import UserError

BAD_INPUT = 2
WIDTH = 120
"""Of a table, in characters: names are not cut where the output is no terminal."""


def run_command(command: Callable[[], int], console: Console) -> int:
    """Run a command; a fault that the user can mend becomes one red line, not a traceback.

    Returns:
        The command's exit status, or `BAD_INPUT`.
    """
    try:
        return command()
    except UserError as error:
        reason = getattr(error, "cause", error)  # from an actor, Ray adds the traceback there
        console.print(f"error: {without_secrets(str(reason))}", style="red", markup=False)
        return BAD_INPUT


_USER = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_VALUE = re.compile(r"(?i)(?<=[?&])([\w.-]*(?:key|secret|password|token|signature)=)[^&\s'\"]+")


def without_secrets(text: str) -> str:
    """A text for a person or a log: what a URI in it says of user, password or key is hidden."""
    return _VALUE.sub(r"\1***", _USER.sub("***", text))


class StopSignal:
    """Has SIGTERM stop the block as Ctrl-C does, by KeyboardInterrupt, and neither at a bad moment.

    Ctrl-C stays ignored where it was, as in the background of a script.

    Attributes:
        status: The exit status that tells which of them it was: 130 or 143.
    """

    def __init__(self) -> None:
        self.status = 128 + signal.SIGINT
        self._held, self._stopped = False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        taken = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            taken.append(signal.SIGINT)
        self._before = {number: signal.getsignal(number) for number in taken}
        self.listen()
        return self

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals (again: a library may have taken one over)."""
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                signal.signal(number, self._stop)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a stop wait for the end of the block, which must not be cut in two."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._stopped:
                self._stopped = False
                raise KeyboardInterrupt

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.status, self._stopped = 128 + number, self._held
        if not self._held:
            raise KeyboardInterrupt


def check_writable_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        UserError: naming the option.
    """
    _check_no_uri(option, path)
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
    _check_no_uri(option, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be made a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{option} {path}: nothing can be written there")


_URI = re.compile(r"([a-zA-Z][\w+.-]+):/+")


def _check_no_uri(option: str, path: Path) -> None:
    """Refuse s3://..., of which a path would make a folder named "s3:" here."""
    if found := _URI.match(str(path)):
        uri = _URI.sub(r"\1://", str(path), count=1)
        raise UserError(
            f"{option} {uri}: a path is needed (of a folder that is mounted, too), not a URI; "
            f"only --storage of fedlpp_ray.tune takes {found[1]}://..."
        )
