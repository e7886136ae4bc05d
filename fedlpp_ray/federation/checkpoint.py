"""A run on disk: the server's adapter, what clients keep, the history and the experiment.

Where later rounds still train from a broadcast (`downlink.every`, fedbuff), its messages too, and
of the newest broadcasts those that are attacked while the run goes on (`adversary.watch`); of all,
where nothing else keeps those that are attacked at its end (`adversary.at_end`).

Everything random in a run is derived from the seed and the round, so this is the whole state: a
restored run goes on with the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedlpp_ray.config import check_same, dump_experiment, load_experiment
from fedlpp_ray.federation.loop import Federation
from fedlpp_ray.federation.records import Final, RoundRecord
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.federation.snapshot import Snapshot
from fedlpp_ray.storage import (
    CheckpointError,
    RunFolder,
    StoredBytes,
    read_folder,
    read_stored,
    write_folder,
)
from fedlpp_ray.storage.runs import EXPERIMENT

HISTORY, ADAPTER = "history.json", "adapter"
FINAL, FINAL_RECORD = "final", "final.json"
"""In the last round's checkpoint: the adapter of the server's final model, and its record."""
CLIENTS, BROADCASTS = "clients", "broadcasts"
Content = TypeVar("Content", bytes, StoredBytes)
_UNDEFINED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers that JSON does not have, as a history writes them: strings."""


def save(federation: Federation, folder: Path) -> None:
    """Write the run into an existing, empty folder, which is whole once its manifest is there."""
    write_folder(folder, _files(federation))


def restore(federation: Federation, folder: Path) -> None:
    """Continue `federation` from what `save` wrote.

    Raises:
        DamagedError: the checkpoint is not whole.
        CheckpointError: another version of the format wrote it, or it does not fit.
        ConfigError: it is of another experiment; the message names the difference.
    """
    files, kept = read_folder(folder, without=CLIENTS), read_stored(folder, CLIENTS)
    check_same(load_experiment(folder / EXPERIMENT), federation.experiment, str(folder))
    try:
        federation.restore(_snapshot(files, kept))
    except ValueError as error:
        reason = getattr(error, "cause", error)  # from an actor, Ray adds the traceback there
        raise CheckpointError(f"{folder}: {reason}") from error


def checkpointed(federation: Federation, folder: RunFolder) -> Iterator[RoundRecord]:
    """The rounds that remain, each yielded once its checkpoint is on the disk."""
    for record in finished_rounds(federation):
        folder.save(record.round, lambda empty: save(federation, empty))
        yield record


def read_history(folder: Path) -> list[RoundRecord]:
    """The finished rounds of a checkpoint."""
    return _history((folder / HISTORY).read_bytes())


def write_adapter(files: Mapping[str, bytes], folder: Path) -> None:
    """Write an adapter's files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def trained(folder: RunFolder) -> dict[str, bytes]:
    """The files of the final model's adapter, or of that after the last finished round.

    Raises:
        CheckpointError: the folder has no checkpoint.
    """
    from fedlpp_ray.federation.solo import TRAINING  # takes seconds

    latest = folder.latest()
    if latest is None:
        raise CheckpointError(f"{folder.path}: has no checkpoint, so no adapter")
    found = read_folder(latest, without=CLIENTS)
    files = _inside(FINAL, found) or _inside(ADAPTER, found)
    return {name: content for name, content in files.items() if name != TRAINING}


def _files(federation: Federation) -> dict[str, bytes | StoredBytes]:
    experiment = dump_experiment(
        federation.experiment,
        "The experiment of this run",
        f"python -m fedlpp_ray.train {EXPERIMENT}",
    )
    snapshot = federation.snapshot()
    history = [_strict(record.to_dict()) for record in snapshot.history]
    broadcasts = [_numbered(f"{BROADCASTS}/{m}", each) for m, each in snapshot.broadcasts.items()]
    return {
        EXPERIMENT: experiment.encode(),
        HISTORY: json.dumps(history, allow_nan=False).encode(),
        **{f"{ADAPTER}/{name}": x for name, x in (snapshot.adapter or {}).items()},
        **_final_files(snapshot.final),
        **_numbered(CLIENTS, snapshot.memories),
        **{name: message for files in broadcasts for name, message in files.items()},
    }


def _snapshot(files: Mapping[str, bytes], kept: Mapping[str, StoredBytes]) -> Snapshot:
    made = {int(name.partition("/")[0]) for name in _inside(BROADCASTS, files)}
    return Snapshot(
        tuple(_history(files[HISTORY])),
        _messages(CLIENTS, kept),
        {each: _messages(f"{BROADCASTS}/{each}", files) for each in made},
        _inside(ADAPTER, files) or None,
        _final(files),
    )


def _final_files(final: Final | None) -> dict[str, bytes]:
    if final is None:
        return {}
    record = json.dumps(_strict(final.to_dict()), allow_nan=False).encode()
    return {FINAL_RECORD: record} | {f"{FINAL}/{name}": x for name, x in final.adapter.items()}


def _final(files: Mapping[str, bytes]) -> Final | None:
    if FINAL_RECORD not in files:
        return None
    return Final(**_defined(json.loads(files[FINAL_RECORD])), adapter=_inside(FINAL, files))


def _inside(name: str, files: Mapping[str, Content]) -> dict[str, Content]:
    """The files in a folder, by their names there."""
    start = f"{name}/"
    return {key.removeprefix(start): x for key, x in files.items() if key.startswith(start)}


def _numbered(name: str, messages: Mapping[int, Content]) -> dict[str, Content]:
    return {f"{name}/{key}.safetensors": content for key, content in messages.items()}


def _messages(name: str, files: Mapping[str, Content]) -> dict[int, Content]:
    return {int(key.partition(".")[0]): x for key, x in _inside(name, files).items()}


def _history(text: bytes) -> list[RoundRecord]:
    return [RoundRecord.from_dict(_defined(record)) for record in json.loads(text)]


def _strict(value: Any) -> Any:
    """Plain values with the numbers that JSON lacks as their names."""
    if isinstance(value, dict):
        return {key: _strict(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _defined(value: Any) -> Any:
    """The inverse of `_strict`."""
    if isinstance(value, dict):
        return {key: _defined(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_defined(x) for x in value]
    return _UNDEFINED.get(value, value) if isinstance(value, str) else value
