"""Commands of Ray on a cluster file, with `ssh` and `rsync` that only note how they were called.

A stand-in for a cloud hands out addresses that look public, so both come first on PATH: nothing is
ever dialled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
STAND_IN = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as log:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=log)
"""


@dataclass(frozen=True)
class Commands:
    """A home, and a cluster file with its placeholders filled in."""

    home: Path
    file: Path

    @property
    def config(self) -> dict[str, Any]:
        """The file."""
        found: dict[str, Any] = yaml.safe_load(self.file.read_text())
        return found

    def ray(self, command: str, *arguments: str) -> str:
        """Run a command of Ray on the cluster file; returns its output."""
        options = ["--no-config-cache"] if command in ("up", "exec") else []
        done = subprocess.run(
            [str(RAY), command, *options, str(self.file), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def calls(self, program: str) -> list[list[str]]:
        """How `ssh` or `rsync` has been called."""
        lines = map(json.loads, (self.home / "calls").read_text().splitlines())
        return [call[1:] for call in lines if call[0] == program]

    def said(self) -> str:
        """All that was to be run on a node."""
        return "\n".join(" ".join(call) for call in self.calls("ssh"))

    def lists(self) -> list[tuple[str, bool]]:
        """Commands of the file for a head, and whether each was to be run."""
        names = ("initialization_commands", "setup_commands", "head_start_ray_commands")
        said = self.said()
        # Up to what quoting leaves as it is.
        return [
            (command, command.split("'")[0].split('"')[0] in said)
            for name in names
            for command in self.config[name]
        ]


def prepare(home: Path, key: str, patch: pytest.MonkeyPatch) -> None:
    """Make a home of it: with the programs, the key (a path in ~/.ssh) and a token."""
    for name in ("ssh", "rsync"):
        (home / name).write_text(STAND_IN.format(python=sys.executable))
        (home / name).chmod(0o755)
    for name in (f".ssh/{key}", ".ray/auth_token"):
        (home / name).parent.mkdir()
        (home / name).write_text("nothing secret")
    patch.setenv("HOME", str(home))
    patch.setenv("CALLS", str(home / "calls"))
    patch.setenv("PATH", f"{home}:{os.environ['PATH']}")
