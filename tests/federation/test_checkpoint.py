"""What a run leaves on the disk: all of its state, whole after a crash, and refused elsewhere."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlpp_ray.config import ConfigError, Experiment, check_same, dump_experiment, fingerprint
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, RoundRecord, checkpoint, preflight
from fedlpp_ray.federation.in_process import in_process
from fedlpp_ray.federation.records import Fault
from fedlpp_ray.storage import (
    CheckpointError,
    DamagedError,
    RunFolder,
    StoredBytes,
    read_folder,
    read_stored,
    stored,
    whole,
    write_file,
    write_folder,
)
from tests.federation.test_loop import numbers

KINDS: dict[str, dict[str, object]] = {
    "optimiser, error feedback, a broadcast that lasts": {
        "server.optimizer": "fedadam",
        "server.lr": 0.1,
        "uplink.bits": 4,
        "uplink.rounding": "stochastic",
        "uplink.error_feedback": True,
        "downlink.rounding": "stochastic",
        "downlink.every": 2,
        "lora.dropout": 0.2,
    },
    "control variates": {
        "client.scaffold": True,
        "client.optimizer": "sgd",
        "client.weight_decay": 0.0,
    },
    "momentum in a gauge that turns": {
        "server.optimizer": "fedavgm",
        "downlink.rotate": "round",
        "downlink.every": 3,
    },
    "a message for each client": {
        "server.optimizer": "fedavgm",
        "downlink.rotate": "client",
        "downlink.perturbation": 0.5,
        "downlink.rounding": "stochastic",
    },
    "codes and scales that stay": {
        "downlink.bits": 2,
        "downlink.hysteresis": 0.5,
        "downlink.hold_scales": True,
        "downlink.dither": "run",
        "downlink.every": 2,
    },
    "own B": {"server.aggregation": "fedsa-lora", "evaluation.server": False},
    "residuals": {"server.aggregation": "flora"},
    "a robust rule with momentum": {
        "server.robust": "trimmed-mean",
        "server.byzantine": 1,
        "server.weighting": "uniform",
        "server.optimizer": "fedavgm",
        "federation.min_updates": 3,
    },
}

QUICK = ("control variates", "own B")
"""Kinds of which the default tests resume a run."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in KINDS],
)
def test_a_run_resumed_after_any_round_gives_the_same_bits(
    tiny_experiment: Experiment, tmp_path: Path, kind: str
) -> None:
    experiment = tiny_experiment.with_values(
        KINDS[kind] | {"federation.rounds": 4, "federation.local_steps": 2}
    )
    preflight.check([experiment])
    federation = Federation(experiment, in_process(experiment))
    folders = []
    for record in federation.run():
        folders.append(tmp_path / str(record.round))
        folders[-1].mkdir()
        checkpoint.save(federation, folders[-1])
    backend = in_process(experiment)
    for folder in folders[:-1]:
        restored = Federation(experiment, backend)
        checkpoint.restore(restored, folder)
        list(restored.run())
        assert numbers(restored.history) == numbers(federation.history)
        assert restored.snapshot().memories == federation.snapshot().memories
        assert backend.adapter() == federation.backend.adapter()


def files_of(experiment: Experiment, round: int) -> dict[str, bytes]:
    """What a checkpoint could hold, without the seconds that a run takes."""
    return {
        "experiment.yaml": dump_experiment(experiment, "x", "y").encode(),
        "adapter/adapter_model.safetensors": bytes([round]) * 1000,
        "clients/3.safetensors": b"kept" * round,
        "history.json": b"[]",
    }


def save(folder: RunFolder, experiment: Experiment, round: int) -> None:
    files: dict[str, Any] = files_of(experiment, round)
    kept = "clients/3.safetensors"
    files[kept] = StoredBytes(files[kept])
    folder.save(round, lambda empty: write_folder(empty, files))


class Cut(BaseException):
    """The power is gone."""


class Disk:
    """A disk that is cut off at its n-th operation, and loses half of what was not synchronised.

    Args:
        monkeypatch: Puts it in the place of the real one.
        steps: Operations that it lives; writing a file is two, before and in the middle.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: float) -> None:
        self.done, self._steps = 0, steps
        self._loose: dict[int, int] = {}  # inodes of files that are not synchronised, and the files
        self._fsync, self._replace, self._rmtree = os.fsync, os.replace, shutil.rmtree
        monkeypatch.setattr(whole.os, "fsync", self.fsync)
        monkeypatch.setattr(whole.os, "replace", self.replace)
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        opened = Path.open

        def torn(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            file = opened(path, mode, *rest, **named)
            return Torn(self, path, file) if "w" in mode else file

        monkeypatch.setattr(Path, "open", torn)

    def step(self) -> None:
        self.done += 1
        if self.done > self._steps:
            for file in self._loose.values():
                os.ftruncate(file, os.fstat(file).st_size // 2)
                os.close(file)
            raise Cut

    def writing(self, path: Path) -> None:
        file = os.open(path, os.O_WRONLY)
        self._loose[os.fstat(file).st_ino] = file
        self.step()

    def fsync(self, descriptor: int) -> None:
        self.step()
        self._fsync(descriptor)
        if (file := self._loose.pop(os.fstat(descriptor).st_ino, None)) is not None:
            os.close(file)

    def replace(self, old: Path, new: Path) -> None:
        self.step()
        self._replace(old, new)

    def rmtree(self, folder: Path) -> None:
        self.step()
        next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
        self.step()
        self._rmtree(folder)


class Torn:
    """A file that is written in two halves."""

    def __init__(self, disk: Disk, path: Path, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file

    def __enter__(self) -> Torn:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> None:
        self._disk.writing(self._path)
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._disk.step()
        self._file.write(content[len(content) // 2 :])


def cut_everywhere(prepare: Callable[[], None], act: Callable[[], None]) -> Any:
    """Do something on a disk cut off at its first operation, at its second, ... until it is not.

    Yields after each; the last time nothing was cut.
    """
    for steps in range(1000):
        prepare()
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, steps)
            try:
                act()
            except Cut:
                cut = True
            else:
                cut = False
        yield cut
        if not cut:
            assert disk.done == steps > 0
            return


def test_a_crash_at_any_step_of_a_save_leaves_the_checkpoint_before_it(
    tiny_experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"

    def two_rounds() -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for round in (1, 2):
            save(RunFolder(path, tiny_experiment), tiny_experiment, round)

    found = []
    for cut in cut_everywhere(
        two_rounds, lambda: save(RunFolder(path, tiny_experiment), tiny_experiment, 3)
    ):
        folder = RunFolder(path, tiny_experiment)
        latest = folder.latest()
        assert latest is not None
        assert latest.name == f"round-{folder.rounds:06d}"  # what is seen as finished is whole
        assert read_folder(latest) == files_of(tiny_experiment, folder.rounds)
        found.append(folder.rounds)
        assert cut or folder.rounds == 3
        save(folder, tiny_experiment, folder.rounds + 1)
        kept = {p.name for p in (path / "checkpoints").iterdir()}
        assert kept == {f"round-{folder.rounds - i:06d}" for i in (0, 1)}
    assert found == sorted(found)
    assert found.count(2) > 15  # files, folders, the manifest, each in several steps
    assert found.count(3) > 3  # after the renaming
    assert not caplog.records


def test_a_crash_in_the_first_save_leaves_nothing_that_looks_finished(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    path = tmp_path / "run"

    def empty() -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()

    for _ in cut_everywhere(
        empty, lambda: save(RunFolder(path, tiny_experiment), tiny_experiment, 1)
    ):
        folder = RunFolder(path, tiny_experiment)
        assert (folder.latest() is None) == (folder.rounds == 0)
        save(folder, tiny_experiment, folder.rounds + 1)
        assert folder.latest() is not None


def test_a_crash_while_a_file_is_replaced_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    found = []
    for _ in cut_everywhere(
        lambda: write_file(path, b"old result"), lambda: write_file(path, b"new result")
    ):
        found.append(path.read_bytes())
    assert found[0] == b"old result"
    assert found[-1] == b"new result"
    assert set(found) == {b"old result", b"new result"}


def test_what_a_client_keeps_is_on_the_disk_once_and_goes_when_nothing_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver's memory and what a checkpoint writes do not grow with those who have taken part."""
    kept = StoredBytes(b"kept")
    temporary = kept._path
    for round in ("one", "two"):
        (tmp_path / round).mkdir()
        write_folder(tmp_path / round, {"clients/3": kept, "history": b"[]"})
    assert temporary.stat().st_nlink == 3  # the same blocks
    restored = read_stored(tmp_path / "two", "clients")["clients/3"]
    assert (restored.read(), restored, temporary.stat().st_nlink) == (b"kept", kept, 4)
    del kept, restored
    assert not temporary.exists()
    assert (tmp_path / "one" / "clients" / "3").stat().st_nlink == 2
    assert read_folder(tmp_path / "one", without="clients") == {"history": b"[]"}

    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "three").mkdir()
    elsewhere = read_stored(tmp_path / "two", "clients")
    write_folder(tmp_path / "three", elsewhere)
    assert read_folder(tmp_path / "three") == {"clients/3": b"kept"}
    flip(tmp_path / "two" / "clients" / "3")
    assert elsewhere["clients/3"].read() == b"kept"
    with pytest.raises(DamagedError, match="clients/3 is not what was written"):
        read_stored(tmp_path / "two", "clients")


def test_stored_bytes_are_checked_copied_with_pickle_and_refused_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = StoredBytes(b"kept")
    copied = pickle.loads(pickle.dumps(kept))
    flip(kept._path)
    with pytest.raises(UserError, match="is not what was written"):
        kept.read()
    assert copied.read() == b"kept"
    child = os.fork()
    if not child:  # what is run at its exit must not touch what is its parent's
        scratch = stored._scratch(os.getppid())
        scratch.remove(copied._path)
        scratch._end()
        os._exit(0)
    os.waitpid(child, 0)
    assert copied.read() == b"kept"
    stored._scratch.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="TMPDIR names another folder"):
        StoredBytes(b"kept")


def test_what_a_killed_process_stored_is_removed_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from fedlpp_ray.storage import StoredBytes\n"
        "kept = StoredBytes(b'kept')\n"
        "print(*os.listdir(os.environ['TMPDIR']), flush=True)\n"
    )
    other = tmp_path / "fedlpp_ray-stored-by-hand"
    other.mkdir()
    killed, left = "os.kill(os.getpid(), signal.SIGKILL)", []
    for end in (killed, killed, ""):
        command = [sys.executable, "-X", "dev", "-c", program + end]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        found = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        left.append(found.stdout.split())
        assert "Warning" not in found.stderr
    assert [len(names) for names in left] == [2, 2, 2]
    assert len({*left[0], *left[1], *left[2]}) == 3 + 1
    assert list(tmp_path.iterdir()) == [other]


def test_of_what_clients_keep_only_what_is_new_is_written(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    values = KINDS["control variates"] | {"federation.rounds": 3}
    experiment = tiny_experiment.with_values(values)
    federation = Federation(experiment, in_process(experiment))
    folders, files = [], []
    for record in federation.run():
        folders.append(tmp_path / str(record.round))
        folders[-1].mkdir()
        checkpoint.save(federation, folders[-1])
        cohort = {client.client for client in record.clients}
        files.append({int(p.stem): p.stat().st_ino for p in (folders[-1] / "clients").iterdir()})
        for client in files[-1] if len(files) > 1 else ():
            again = files[-2].get(client) == files[-1][client]
            assert again == (client not in cohort)
    assert files[0].keys() < files[2].keys()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    tiny_experiment: Experiment,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = RunFolder(tmp_path, tiny_experiment)
    for name in [*files_of(tiny_experiment, 1), whole.MANIFEST]:
        for round in (6, 7):
            save(folder, tiny_experiment, round)  # writes over what is damaged
        newest = tmp_path / "checkpoints" / "round-000007"
        assert folder.latest() == newest
        damage(newest / name)
        with pytest.raises(DamagedError, match=r"round-000007 is (damaged|not whole): .*\."):
            read_folder(newest)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert folder.latest() == newest.with_name("round-000006")
        assert "round-000007 is" in caplog.text
    damage(tmp_path / "checkpoints" / "round-000006" / "history.json")
    with pytest.raises(DamagedError, match="none of its 2 checkpoints is whole"):
        folder.latest()


def test_a_checkpoint_of_another_format_is_refused_not_passed_over(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path, tiny_experiment)
    save(folder, tiny_experiment, 1)
    monkeypatch.setattr(whole, "FORMAT", 99)
    save(folder, tiny_experiment, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"of format 99; .* reads format {whole.FORMAT}"):
        folder.latest()


def test_what_differs_is_named_with_both_values(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    save(RunFolder(tmp_path, tiny_experiment), tiny_experiment, 1)
    other = tiny_experiment.with_values({"downlink.bits": 2, "runtime.threads": 3})
    words = "downlink.bits is 4 in the checkpoint, 2 here; runtime.threads is 1 in the .*, 3 here$"
    with pytest.raises(ConfigError, match=words):
        RunFolder(tmp_path, other).latest()
    assert fingerprint(other) != fingerprint(tiny_experiment)


def test_where_actors_run_may_differ_but_not_whether_on_a_gpu(tiny_experiment: Experiment) -> None:
    elsewhere = {
        "runtime.client_actors": 7,
        "runtime.client_cpus": 2.0,
        "runtime.server_cpus": 3.0,
        "runtime.start_timeout": 1.0,
    }
    moved = tiny_experiment.with_values(elsewhere)
    check_same(tiny_experiment, moved, "x")
    assert fingerprint(moved) == fingerprint(tiny_experiment)
    half, quarter = (
        tiny_experiment.with_values({"runtime.client_gpus": share}) for share in (0.5, 0.25)
    )
    check_same(half, quarter, "x")
    with pytest.raises(ConfigError, match=r"runtime.client_gpus is 0.5 in the checkpoint, 0.0 her"):
        check_same(half, tiny_experiment, "x")


def test_a_state_that_is_not_the_recorded_one_is_refused(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    """Whole files, of two rounds: their checksums cannot tell."""
    federation = Federation(tiny_experiment, in_process(tiny_experiment))
    folders = [tmp_path / name for name in ("1", "2", "mixed")]
    for folder in folders:
        folder.mkdir()
    for folder, _ in zip(folders[:2], federation.run(), strict=False):
        checkpoint.save(federation, folder)
    old, new = map(read_folder, folders[:2])
    adapter = {name: content for name, content in old.items() if name.startswith("adapter/")}
    write_folder(folders[2], new | adapter)
    with pytest.raises(CheckpointError, match=r"the state restored is not that after round 2: .*"):
        checkpoint.restore(federation, folders[2])


def test_numbers_that_json_lacks_survive_in_strict_json(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    federation = Federation(tiny_experiment, in_process(tiny_experiment))
    next(federation.run())
    record = federation.history[0]
    evaluation = record.evaluation
    assert evaluation is not None
    values = {"loss": math.nan, "accuracy": math.inf, "macro_f1": -math.inf}
    changed = replace(record, evaluation=replace(evaluation, server=values))
    client = replace(record.clients[0], loss=0.1 + 0.2, fault=Fault("late", "0.1 + 0.2"))
    diverged = replace(record.clients[1], loss=math.nan)
    federation.history[0] = replace(changed, clients=(client, diverged))
    checkpoint.save(federation, tmp_path)
    text = (tmp_path / checkpoint.HISTORY).read_text()
    json.loads(text, parse_constant=pytest.fail)
    (read,) = checkpoint.read_history(tmp_path)
    assert isinstance(read, RoundRecord)
    assert repr(read) == repr(federation.history[0])  # NaN is not equal to itself


def test_two_processes_do_not_share_a_folder(tiny_experiment: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, tiny_experiment)
    with (
        folder.locked(),
        pytest.raises(UserError, match="another process is running here"),
        RunFolder(tmp_path, tiny_experiment).locked(),
    ):
        pass
    with folder.locked():
        pass
