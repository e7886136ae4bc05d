"""What the command lines share."""

from __future__ import annotations

from collections.abc import Callable

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
        console.print(f"error: {error}", style="red", markup=False)
        return BAD_INPUT
