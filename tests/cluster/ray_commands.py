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

    def check_run(self) -> str:
        """The head's commands were to be run, and none of a worker's; returns what was said."""
        said = self.said()
        assert [command for command, ran in self.lists() if not ran] == []
        start = next(line for line in said.splitlines() if "ray start --head" in line)
        assert "RAY_AUTH_MODE=token ray start --head --port=6379" in start
        assert "nvidia-smi" not in said
        assert "nothing secret" not in said
        return said

    def check_reached(self, address: str, key: str) -> None:
        """One node alone was to be reached, by a key of ~/.ssh."""
        for call in self.calls("ssh"):
            assert f"ubuntu@{address}" in call
            assert call[call.index("-i") + 1] == f"~/.ssh/{key}"
        for call in self.calls("rsync"):
            assert any(f"ubuntu@{address}:" in part for part in call)

    def check_sent(self, *names: str) -> None:
        """Files of these names were to be sent."""
        sent = [" ".join(call) for call in self.calls("rsync")]
        for name in names:
            assert any(name in call for call in sent), name

    def check_exec_and_submit(self, command: str, folder: Path) -> None:
        """A command and a program reach the head as they are."""
        self.ray("exec", command)
        assert command in self.said()
        (folder / "job.py").write_text("print(1)\n")
        self.ray("submit", str(folder / "job.py"), "--rounds=2")
        self.check_sent("job.py")
        assert "job.py --rounds=2" in self.said().replace("'", "")

    def check_tunnels_and_database(self) -> None:
        """Both tunnels, and the way back of MLflow's database."""
        self.ray("dashboard")
        self.ray("dashboard", "--port", "5000", "--remote-port", "5000")
        tunnels = [call[call.index("-L") + 1] for call in self.calls("ssh") if "-L" in call]
        assert tunnels == ["8265:localhost:8265", "5000:localhost:5000"]
        self.ray("rsync-down", "/home/ubuntu/mlflow/", str(self.home / "mlflow"))
        fetched = " ".join(self.calls("rsync")[-1])
        assert ":/home/ubuntu/mlflow/" in fetched
        assert "mlflow.db" not in fetched  # which would leave it out


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
