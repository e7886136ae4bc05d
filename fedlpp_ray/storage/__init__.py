"""Files that survive a crash: written aside, synchronised, renamed, and checked when read."""

from fedlpp_ray.storage.runs import RunFolder
from fedlpp_ray.storage.stored import StoredBytes
from fedlpp_ray.storage.whole import (
    FORMAT,
    CheckpointError,
    DamagedError,
    read_folder,
    read_stored,
    write_file,
    write_folder,
)

__all__ = [
    "FORMAT",
    "CheckpointError",
    "DamagedError",
    "RunFolder",
    "StoredBytes",
    "read_folder",
    "read_stored",
    "write_file",
    "write_folder",
]
