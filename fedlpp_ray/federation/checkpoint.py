"""A run on disk: the server's adapter, what clients keep, the history and the experiment.

Where `downlink.every` leaves a broadcast in force, its messages too; the history says who has it.

Everything random in a run is derived from the seed and the round, so this is the whole state: a
restored run goes on with the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from fedlpp_ray.config import ConfigError, dump_experiment, load_experiment
from fedlpp_ray.federation.loop import Federation
from fedlpp_ray.federation.records import RoundRecord

EXPERIMENT, HISTORY, ADAPTER = "experiment.yaml", "history.json", "adapter"
CLIENTS, BROADCAST = "clients", "broadcast"


def save(federation: Federation, folder: Path) -> None:
    """Write the run into an existing, empty folder.

    The history comes last and by renaming: a folder that has it is whole.
    """
    write_adapter(federation.backend.adapter(), folder / ADAPTER)
    _write_messages(federation._memories, folder / CLIENTS)
    following = len(federation.history) + 1
    if federation.experiment.downlink.made_in(following) < following:
        _write_messages(federation._broadcasts, folder / BROADCAST)
    text = dump_experiment(
        federation.experiment,
        "The experiment of this run",
        f"python -m fedlpp_ray.train {EXPERIMENT}",
    )
    (folder / EXPERIMENT).write_text(text, encoding="utf-8")
    aside = folder / f"{HISTORY}.part"
    history = [record.to_dict() for record in federation.history]
    with aside.open("w", encoding="utf-8") as file:
        json.dump(history, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(folder / HISTORY)


def restore(federation: Federation, folder: Path) -> None:
    """Continue `federation` from what `save` wrote.

    Raises:
        ConfigError: the checkpoint is of another experiment.
    """
    if load_experiment(folder / EXPERIMENT) != federation.experiment:
        raise ConfigError(f"{folder}: this checkpoint is of another experiment")
    files = {path.name: path.read_bytes() for path in (folder / ADAPTER).iterdir()}
    federation.backend.restore(files)
    federation._memories = _read_messages(folder / CLIENTS)
    federation._broadcasts = _read_messages(folder / BROADCAST)
    federation.history = read_history(folder)


def read_history(folder: Path) -> list[RoundRecord]:
    """The finished rounds of a checkpoint."""
    records = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    return [RoundRecord.from_dict(record) for record in records]


def write_adapter(files: dict[str, bytes], folder: Path) -> None:
    """Write an adapter's files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_messages(messages: Mapping[int, bytes], folder: Path) -> None:
    """One file a message, in a folder that is made where there is any."""
    for key, content in messages.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{key}.safetensors").write_bytes(content)


def _read_messages(folder: Path) -> dict[int, bytes]:
    return {int(path.stem): path.read_bytes() for path in folder.glob("*.safetensors")}
