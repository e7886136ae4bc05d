"""The folder of one run: its last checkpoints, its result, and who it is."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlpp_ray.config import Experiment, check_same, load_experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.storage.whole import (
    ASIDE,
    DamagedError,
    check_folder,
    read_folder,
    sync,
    write_file,
    write_folder,
)

EXPERIMENT = "experiment.yaml"
"""The experiment, in each checkpoint."""
CHECKPOINTS, RESULT, RUN_ID, LOCK = "checkpoints", "result.json", "run-id", "lock"
BROADCASTS = "broadcasts"
LEAK_CURVE = "leak_curve.png"
KEPT = 2

logger = logging.getLogger(__name__)


def read_result(run: Path) -> dict[str, Any]:
    """The result of a finished run, by its folder.

    Raises:
        UserError: there is none, or it is not what a run writes.
    """
    path = run / RESULT
    if not path.exists():
        raise UserError(
            f"{run} has no {RESULT}: it is no finished run of python -m fedlpp_ray.train"
        )
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the result of a run: {error}") from None
    if reason := _what_is_missing(found):
        raise UserError(f"{path}: not the result of a run: {reason}")
    return dict(found)


def _what_is_missing(found: Any) -> str | None:
    """Of what a result must have for others to read it, what a value lacks."""
    if not isinstance(found, dict):
        return "it holds no keys"
    for key, kind in (("config", dict), ("history", list), ("floor", dict), ("protection", dict)):
        if not isinstance(found.get(key), kind) or not found[key]:
            return f"no '{key}'"
    if not all(isinstance(record, dict) for record in found["history"]):
        return "rounds of its 'history' hold no keys"
    return None


class RunFolder:
    """Where a run keeps what it needs to go on, and what it sent.

    `checkpoints/round-000007` is the state after round 7; the last two are kept.
    `broadcasts/round-000007` has the messages made in round 7; all are kept. `result.json` is there
    once the run is finished.

    Args:
        path: The folder; made by the first write.
        experiment: What is run. A folder of another experiment is refused when it is read.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self._experiment = path, experiment
        self._checkpoints = path / CHECKPOINTS
        self._broadcasts = path / BROADCASTS

    @property
    def rounds(self) -> int:
        """The last finished round that has a checkpoint; 0 if none has."""
        return max((read_round(path) for path in self._saved()), default=0)

    def check_new(self) -> None:
        """Refuse a folder that a run has begun to fill.

        Raises:
            UserError: saying how to go on with that run, or start another.
        """
        if self.rounds or (self.path / RESULT).exists():
            rounds = f"{self.rounds} finished round{'s' if self.rounds > 1 else ''}"
            raise UserError(
                f"{self.path} holds {rounds if self.rounds else 'the result'} of a run already: "
                "--resume goes on with it, "
                "--output DIR starts anew in another folder"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out for the time of the block; the lock dies with the process.

        Raises:
            UserError: another process runs here.
        """
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is running here") from None
            yield

    def save(self, round: int, write: Callable[[Path], None]) -> None:
        """Add the checkpoint after a round: written aside, then renamed; older ones go.

        Args:
            round: From 1.
            write: Writes the checkpoint into an empty folder, and has it on the disk.
        """
        if not self._checkpoints.exists():
            self._checkpoints.mkdir(parents=True)
            sync(self.path)
            sync(self.path.parent)
        for leftover in self._checkpoints.glob(f"*{ASIDE}"):
            shutil.rmtree(leftover)
        target = self._checkpoints / f"round-{round:06d}"
        aside = target.with_name(target.name + ASIDE)
        aside.mkdir()
        write(aside)
        if target.exists():  # a damaged one, which the run did not go on from
            self._drop(target)
        os.replace(aside, target)
        sync(self._checkpoints)
        for old in self._saved()[:-KEPT]:
            self._drop(old)

    def latest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are passed over with a warning.

        Raises:
            DamagedError: there are checkpoints, and none is whole.
            CheckpointError: another version of the format wrote it.
            ConfigError: it is of another experiment, naming the difference.
        """
        saved = self._saved()
        for path in reversed(saved):
            try:
                check_folder(path)
            except DamagedError as error:
                logger.warning("%s; the one before it is used", error)
                continue
            check_same(load_experiment(path / EXPERIMENT), self._experiment, str(path))
            return path
        if saved:
            raise DamagedError(
                f"{self.path}: none of its {len(saved)} checkpoints is whole; --output DIR starts "
                "anew in another folder"
            )
        return None

    def keep(self, round: int, messages: Mapping[int, bytes]) -> None:
        """Add what was broadcast in a round, if anything was, for whoever attacks the run.

        In the place of another one: a run that went on may have left a different round behind.

        Args:
            round: In which it was made.
            messages: By edition.
        """
        target = self._broadcasts / f"round-{round:06d}"
        files = {f"{key}.safetensors": x for key, x in messages.items()}
        if not any(messages.values()) or _holds(target, files):
            return
        aside = target.with_name(target.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_folder(aside, files)
        if target.exists():
            self._drop(target)
        os.replace(aside, target)
        sync(self._broadcasts)

    def kept(self) -> dict[int, dict[int, bytes]]:
        """All that was broadcast, by the round in which it was made and the edition.

        Raises:
            DamagedError: a broadcast is not whole.
        """
        found = self._broadcasts.glob("round-*")
        whole = sorted((path for path in found if path.suffix != ASIDE), key=read_round)
        return {
            read_round(path): {int(Path(n).stem): x for n, x in read_folder(path).items()}
            for path in whole
        }

    def result(self) -> str | None:
        """The JSON text of the finished run's result, or None.

        Raises:
            ConfigError: it is of another experiment, naming the difference.
        """
        path = self.path / RESULT
        if not path.exists():
            return None
        text = path.read_text(encoding="utf-8")
        try:
            there = Experiment.from_dict(json.loads(text)["config"], str(path))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}: not the result of a run") from None
        check_same(there, self._experiment, str(path))
        return text

    def write_result(self, text: str) -> None:
        """Write `result.json`: the run is finished."""
        write_file(self.path / RESULT, text.encode())

    def run_id(self) -> str:
        """A name for this run that no other has; drawn when it is first asked for."""
        path = self.path / RUN_ID
        if not path.exists():
            write_file(path, uuid.uuid4().hex.encode())
        return path.read_text(encoding="utf-8")

    def _saved(self) -> list[Path]:
        """Checkpoints, oldest first, whole or not."""
        found = self._checkpoints.glob("round-*")
        return sorted((path for path in found if path.suffix != ASIDE), key=read_round)

    def _drop(self, path: Path) -> None:
        """Delete a checkpoint; a crash in between leaves it aside, not in half."""
        aside = path.with_name(f"{path.name}.old{ASIDE}")
        os.replace(path, aside)
        shutil.rmtree(aside)


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a folder is there, whole, with these files."""
    try:
        return folder.exists() and read_folder(folder) == files
    except DamagedError:
        return False


def read_round(path: Path) -> int:
    """Of a checkpoint or of broadcasts, by the folder's name."""
    return int(path.name.partition("-")[2])
