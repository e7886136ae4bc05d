"""Files that survive a crash: written aside, synchronised, renamed, and checked when read."""

from fedlpp_ray.storage.runs import RunFolder
from fedlpp_ray.storage.whole import (
    FORMAT,
    CheckpointError,
    DamagedError,
    read_folder,
    write_file,
    write_folder,
)

__all__ = [
    "FORMAT",
    "CheckpointError",
    "DamagedError",
    "RunFolder",
    "read_folder",
    "write_file",
    "write_folder",
]
