"""The processes that are measured: Flower's, ours, and the arithmetic of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from uuid import uuid4

from benchmarks.flower.settings import ROOT, WORKERS, Setting
from fedlpp_ray.assets import cache_folder
from fedlpp_ray.errors import UserError

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
LINES = 30
"""So much of a failed process's output is shown."""


class ProcessError(UserError):
    """A process of the benchmark failed; the message ends with the last lines of its output."""


def install() -> Path:
    """Python of Flower's virtual environment, which is made once and kept in `cache_folder()`.

    Raises:
        ProcessError: it cannot be installed.
    """
    folder = cache_folder() / "benchmark-flower"
    python, mark = folder / "bin" / "python", folder / "installed.txt"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if not (mark.exists() and mark.read_text(encoding="utf-8") == wanted):
        print(f"installing Flower into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
        _run(command, folder / "install.log", {})
        mark.write_text(wanted, encoding="utf-8")
    return python


def run_flower(python: Path, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the Flower app; returns what it measured, see `app.server_app.make_app`.

    Raises:
        ProcessError: it failed, or a client did.
    """
    source, out = folder / "flower.json", folder / "flower_out.json"
    source.write_text(json.dumps(config), encoding="utf-8")
    out.unlink(missing_ok=True)
    environment = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(folder / "flwr")}
    command = [str(python), "-m", "benchmarks.flower.app.run", str(source), str(out)]
    _run(command, folder / "flower.log", environment)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    returned = [int(record["returned"]) for record in found["clients"]]
    if returned != [config["cohort"]] * config["rounds"]:
        raise ProcessError(f"of {config['cohort']} Flower clients a round returned: {returned}")
    return found


def run_ours(setting: Setting, base: str, rounds: int, folder: Path) -> list[float]:
    """Run the federation through Ray actors; returns the seconds of each round.

    Raises:
        ProcessError: it failed.
    """
    out, output = folder / "ours_out.json", folder / f"run-{uuid4().hex}"
    command = [sys.executable, "-m", "fedlpp_ray.train", setting.config]
    command += [*setting.overrides(base, rounds), "--json", str(out), "--output", str(output)]
    _run(command, folder / "ours.log", {})
    return round_seconds(json.loads(out.read_text(encoding="utf-8")))


def round_seconds(result: Mapping[str, Any]) -> list[float]:
    """Seconds of each round in a result of `fedlpp_ray.train --json`, without evaluation.

    From the end of one round to that of the next: also the checkpoint that each leaves.
    """
    return [r["seconds"]["total"] - r["seconds"]["evaluate"] for r in result["history"]]


def run_arithmetic(setting: Setting, config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Seconds that a client's steps take, by base, with as many processes at it as workers.

    Raises:
        ProcessError: one of them failed.
    """
    source = folder / "arithmetic.json"
    source.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.flower.arithmetic", setting.name, str(source)]
    outs = [folder / f"arithmetic_out{worker}.json" for worker in range(WORKERS)]
    logs = [folder / f"arithmetic{worker}.log" for worker in range(WORKERS)]
    started = [
        _start([*command, str(out), str(worker)], log, {})
        for worker, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        for process, log in zip(started, logs, strict=True):
            _check(process.wait(), command, log)
    finally:
        for process in started:
            process.kill()
    found = [json.loads(out.read_text(encoding="utf-8")) for out in outs]
    return {base: mean(one[base] for one in found) for base in found[0]}


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    process = _start(command, log, environment)
    try:
        _check(process.wait(), command, log)
    finally:
        process.kill()


def _start(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a process that reads no hub, in the repository's root."""
    # Without compiled files every worker would compile every import anew.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=kept | fixed | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def _check(status: int, command: Sequence[str], log: Path) -> None:
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
        raise ProcessError("\n".join([f"{' '.join(command)}: exit status {status}", *lines]))
