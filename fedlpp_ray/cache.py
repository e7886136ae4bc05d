"""Tensors that are made once on a node and mapped by every process that needs them.

A file of `cache_folder()` is named by what decides its content and by its own checksum:
KIND/KEY-CRC32.safetensors. It appears there complete or not at all, and never changes, so that who
has mapped it is not disturbed. Its pages are the operating system's: processes share them, and who
writes to such a tensor gets a copy of that page of his own (MAP_PRIVATE).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlpp_ray.assets import cache_folder

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
_CHUNK = 1 << 24
_PAGE, _DONTNEED = mmap.PAGESIZE, 4
_MMAP_THRESHOLD = -3
TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls types."""


def share(kind: str, content: Mapping[str, object], make: Callable[[], Tensors]) -> Tensors:
    """What `make` returns, mapped from a file that is written by the first who needs it.

    Others that come meanwhile wait for it. A damaged file is made anew. Where the cache cannot be
    written, it is said in the log and the tensors are this process's own.

    Args:
        kind: Folder inside `cache_folder()`.
        content: All that decides the tensors, as JSON can write it.
        make: The tensors, contiguous, on the CPU, none inside another.
    """
    made = functools.cache(make)
    try:
        return share_file(kind, content, lambda path: save_file(made(), path))
    except (OSError, SafetensorError):
        return made()


def share_file(kind: str, content: Mapping[str, object], write: Callable[[Path], None]) -> Tensors:
    """As `share`, of tensors that are written into a file and perhaps never in memory together.

    Args:
        kind: Folder inside `cache_folder()`.
        content: All that decides the tensors, as JSON can write it.
        write: Makes the file of safetensors at this path.

    Raises:
        OSError, SafetensorError: neither the cache nor a temporary folder can be written.
    """
    folder, key = cache_folder() / kind, _key(content)
    found = _read(folder, key)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            found = _read(folder, key)
            if found is None:
                _write(folder, key, write)
                found = _read(folder, key)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "%s: %s; so this process shares no memory with others. $FEDLPP_RAY_CACHE names another "
            "folder",
            *(folder, error),
        )
    return _from_file(write) if found is None else found


def _from_file(write: Callable[[Path], None]) -> Tensors:
    """The same, mapped from a file without a name.

    Some kernels' bits depend on where in memory a tensor begins, so that it must be as in a file
    that is shared.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        write(path)
        return load_file(path)


def write_parts(path: Path, outline: Tensors, parts: Iterable[Tensors]) -> None:
    """Write a file of safetensors part by part, so that no more than a part is in memory.

    Args:
        path: The file.
        outline: All tensors by name; of each only type and shape are read.
        parts: Each tensor once, in any order.

    Raises:
        ValueError: naming tensors of which the parts and the outline differ.
    """
    header, end = dict[str, Any](), 0
    for name, tensor in sorted(outline.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {**_described(tensor), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    missing = set(header)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for name, tensor in (item for part in parts for item in part.items()):
            known = header.get(name, {})
            described = _described(tensor)
            if name not in missing or described != {key: known[key] for key in described}:
                raise ValueError(name)
            missing.remove(name)
            file.seek(start + known["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if missing:
        raise ValueError(", ".join(sorted(missing)[:5]))


def _described(tensor: Tensor) -> dict[str, Any]:
    """Type and shape, as a header has them."""
    return {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}


def is_there(kind: str, content: Mapping[str, object]) -> bool:
    """Whether a file for `share` exists; not whether it is sound."""
    return any(_files(cache_folder() / kind, _key(content)))


def mapped_ranges() -> list[tuple[int, int]]:
    """First and last address of this process's memory that files back; none known: empty."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return []
    rows = [line.split(maxsplit=5) for line in lines]
    ends = [row[0].split("-") for row in rows if len(row) == 6 and row[5].startswith("/")]
    return [(int(first, 16), int(last, 16)) for first, last in ends]


class Pages:
    """The memory in which this process has files mapped, as it is now."""

    def __init__(self) -> None:
        self._ranges = mapped_ranges()
        self._libc = ctypes.CDLL(None, use_errno=True) if self._ranges else None

    def forget(self, tensor: Tensor) -> None:
        """Have no pages of a mapped tensor in memory, until they are read again.

        Only what was not written to: a page of one's own would be as in the file again. A tensor
        that is not mapped stays as it is.
        """
        first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not any(low <= first and first + size <= high for low, high in self._ranges):
            return
        start, end = -(-first // _PAGE) * _PAGE, (first + size) // _PAGE * _PAGE
        if self._libc is not None and end > start:
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def return_large_blocks() -> None:
    """Have the C library give what is freed of a megabyte and more back to the system at once.

    By default it keeps blocks of up to 32 MB, in pieces: layers that come and go would cost a
    process more memory than the model. Nothing where it is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


def _key(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _files(folder: Path, key: str) -> list[Path]:
    return sorted(folder.glob(f"{key}-*.safetensors"))


def _read(folder: Path, key: str) -> Tensors | None:
    for file in _files(folder, key):
        try:
            if file.stem == f"{key}-{_checksum(file)}":
                return load_file(file)
        except (OSError, SafetensorError) as error:
            logger.debug("%s: %s", file, error)
        logger.warning("%s is damaged: it is made anew", file)
        with suppress(OSError):
            file.unlink(missing_ok=True)
    return None


def _write(folder: Path, key: str, write: Callable[[Path], None]) -> None:
    for left in folder.glob(f".{key}-*"):  # by one that was killed: the lock is ours
        left.unlink(missing_ok=True)
    aside = folder / f".{key}-{uuid4().hex}"
    try:
        write(aside)
        with aside.open("rb+") as file:  # on the disk before it has its name
            os.fsync(file.fileno())
        aside.replace(folder / f"{key}-{_checksum(aside)}.safetensors")
    finally:
        aside.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"
