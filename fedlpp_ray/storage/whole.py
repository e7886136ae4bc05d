"""A folder of files with a manifest: whole after a crash or a power cut, or known not to be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedlpp_ray.errors import UserError
from fedlpp_ray.storage.stored import StoredBytes

Found = TypeVar("Found", bytes, StoredBytes)

FORMAT = 1
"""Version of what a checkpoint holds and how; raised when that changes."""
MANIFEST = "manifest.json"
ASIDE = ".part"
"""Suffix of what is being written."""


class CheckpointError(UserError):
    """A checkpoint cannot be used."""


class DamagedError(CheckpointError):
    """A checkpoint is not whole: a write was interrupted, or the disk gave other bytes back."""


def write_file(path: Path, content: bytes) -> None:
    """Replace a file at once: after a crash it has the old content or the new."""
    aside = path.with_name(path.name + ASIDE)
    aside.write_bytes(content)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes | StoredBytes]) -> None:
    """Write files into an existing, empty folder; it is whole once the manifest is there.

    Args:
        folder: Where to.
        files: Contents by path within the folder, parts joined by "/".
    """
    for name in {name.rpartition("/")[0] for name in files} - {""}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, StoredBytes):
            content.place(folder / name)
        else:
            (folder / name).write_bytes(content)
    # Only now: what the system has begun to write by itself need not be waited for one by one.
    for path in [*map(folder.joinpath, files), *{(folder / n).parent for n in files} - {folder}]:
        sync(path)
    listed = {name: _entry(content) for name, content in files.items()}
    manifest = json.dumps({"format": FORMAT, "files": listed}, indent=1)
    write_file(folder / MANIFEST, manifest.encode())


def read_folder(folder: Path, without: str = "") -> dict[str, bytes]:
    """The files that `write_folder` wrote, every byte checked.

    Args:
        folder: What it wrote.
        without: A folder in it that is left out.

    Raises:
        DamagedError: a file is missing, or is not what was written.
        CheckpointError: another version wrote it.
    """
    listed = _manifest(folder).items()
    wanted = [each for each in listed if not (without and each[0].startswith(f"{without}/"))]
    return {name: _checked(folder, name, Path.read_bytes, entry) for name, entry in wanted}


def read_stored(folder: Path, inside: str) -> dict[str, StoredBytes]:
    """The files of one folder in it, as `read_folder`, but for their bytes in memory."""
    listed = _manifest(folder).items()
    wanted = [each for each in listed if each[0].startswith(f"{inside}/")]
    return {name: _checked(folder, name, StoredBytes, entry) for name, entry in wanted}


def check_folder(folder: Path) -> None:
    """Check every byte; raises as `read_folder`."""
    for name, entry in _manifest(folder).items():
        _checked(folder, name, StoredBytes, entry)


def _checked(folder: Path, name: str, read: Callable[[Path], Found], expected: Any) -> Found:
    try:
        content = read(folder / name)
    except OSError as error:
        raise DamagedError(f"{folder} is damaged: {name}: {error.strerror}") from None
    entry = _entry(content)
    if entry["bytes"] != expected["bytes"]:
        found = f"{entry['bytes']} of {expected['bytes']} bytes"
        raise DamagedError(f"{folder} is damaged: {name} has {found}")
    if entry["sha256"] != expected["sha256"]:
        raise DamagedError(f"{folder} is damaged: {name} is not what was written (SHA-256)")
    return content


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
    except OSError as error:
        raise DamagedError(f"{folder} is not whole: {MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{folder} is damaged: {MANIFEST} cannot be read") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} is a checkpoint of format {version}; this version reads format {FORMAT}"
        )
    return files  # type: ignore[no-any-return]


def _entry(content: bytes | StoredBytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    if isinstance(content, StoredBytes):
        return {"bytes": content.size, "sha256": content.sha256}
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
