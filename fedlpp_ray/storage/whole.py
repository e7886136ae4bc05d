"""A folder of files with a manifest: whole after a crash or a power cut, or known not to be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlpp_ray.errors import UserError
from fedlpp_ray.storage.stored import StoredBytes, sha256_of

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
    files = {}
    for name, entry in wanted:
        with _damaged(folder, name):
            files[name] = content = (folder / name).read_bytes()
        _compare(folder, name, _entry(content), entry)
    return files


def read_stored(folder: Path, inside: str) -> dict[str, StoredBytes]:
    """The files of one folder in it, as `read_folder`, but for their bytes in memory.

    Raises:
        UserError: they cannot be stored; the checkpoint may be whole.
    """
    names = [name for name in _manifest(folder) if name.startswith(f"{inside}/")]
    check_folder(folder, names)
    return {name: StoredBytes(folder / name) for name in names}


def check_folder(folder: Path, names: Iterable[str] | None = None) -> None:
    """Check every byte, of all files or of some; raises as `read_folder`."""
    listed = _manifest(folder)
    for name in listed if names is None else names:
        with _damaged(folder, name):
            path = folder / name
            found = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        _compare(folder, name, found, listed[name])


@contextmanager
def _damaged(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{folder} is damaged: {name}: {error.strerror}") from None


def _compare(folder: Path, name: str, found: dict[str, Any], expected: Any) -> None:
    if found["bytes"] != expected["bytes"]:
        sizes = f"{found['bytes']} of {expected['bytes']} bytes"
        raise DamagedError(f"{folder} is damaged: {name} has {sizes}")
    if found["sha256"] != expected["sha256"]:
        raise DamagedError(f"{folder} is damaged: {name} is not what was written (SHA-256)")


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
