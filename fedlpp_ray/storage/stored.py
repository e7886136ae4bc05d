"""Bytes that wait on the disk, not in memory."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

from fedlpp_ray.errors import UserError

_PREFIX, _LOCK = "fedlpp_ray-stored-", "lock"


class StoredBytes:
    """Bytes in a temporary file, which goes with the last reference to this object.

    Args:
        source: The bytes; or a file, of which this becomes a second name where it can.

    Attributes:
        size: Number of bytes.
        sha256: Their digest, in hexadecimal.

    Raises:
        UserError: they cannot be written.
    """

    def __init__(self, source: bytes | Path) -> None:
        try:
            scratch = _scratch(os.getpid())
            self._path = scratch.new()
            weakref.finalize(self, scratch.remove, self._path)
            if isinstance(source, Path):
                _link(source, self._path)
            else:
                self._path.write_bytes(source)
            self.size, self.sha256 = self._path.stat().st_size, sha256_of(self._path)
        except OSError as error:
            where = tempfile.gettempdir()
            raise UserError(f"{where}: {error.strerror}; TMPDIR names another folder") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredBytes) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple[type[StoredBytes], tuple[bytes]]:
        return StoredBytes, (self.read(),)

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: they are not those that were written.
        """
        content = self._path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"{self._path}: is not what was written (SHA-256)")
        return content

    def place(self, path: Path) -> None:
        """Give the bytes another file, without writing them where both are on one disk."""
        _link(self._path, path)


def sha256_of(path: Path) -> str:
    """A file's digest, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Scratch:
    """A folder of one process. It goes when that ends, or with the next one if it was killed."""

    def __init__(self, owner: int) -> None:
        root, self._owner, self._number = Path(tempfile.gettempdir()), owner, count()
        for left in root.glob(f"{_PREFIX}*"):
            _remove_left(left)
        aside = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._file = (aside / _LOCK).open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)  # before it has the name by which others look for it
        self._folder = aside.rename(root / aside.name.removeprefix("."))
        atexit.register(self._end)

    def new(self) -> Path:
        """A path that there is no file of yet."""
        return self._folder / str(next(self._number))

    def remove(self, path: Path) -> None:
        """Delete a file, unless this is a copy of the process, by a fork."""
        if os.getpid() == self._owner:
            path.unlink(missing_ok=True)

    def _end(self) -> None:
        if os.getpid() == self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._file.close()


@cache
def _scratch(process: int) -> _Scratch:
    return _Scratch(process)


def _remove_left(folder: Path) -> None:
    with suppress(OSError), (folder / _LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
        shutil.rmtree(folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
