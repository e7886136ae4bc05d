"""Bytes that wait on the disk, not in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from functools import cache
from itertools import count
from pathlib import Path

_number = count()


class StoredBytes:
    """Bytes in a temporary file, which goes with the last reference to this object.

    Args:
        source: The bytes; or a file, of which this becomes a second name where it can.

    Attributes:
        size: Number of bytes.
        sha256: Their digest, in hexadecimal.
    """

    def __init__(self, source: bytes | Path) -> None:
        self._path = Path(_folder().name) / str(next(_number))
        weakref.finalize(self, self._path.unlink, missing_ok=True)
        if isinstance(source, Path):
            _link(source, self._path)
        else:
            self._path.write_bytes(source)
        with self._path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredBytes) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def read(self) -> bytes:
        """The bytes."""
        return self._path.read_bytes()

    def place(self, path: Path) -> None:
        """Give the bytes another file, without writing them where both are on one disk."""
        _link(self._path, path)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process; deleted when it ends."""
    return tempfile.TemporaryDirectory(prefix="fedlpp_ray-")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
