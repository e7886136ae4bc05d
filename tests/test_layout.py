"""The layout is the architecture: each room imports only rooms below it, and Ray has one room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedlpp_ray"
ROOMS = [
    *("errors", "assets", "cache", "state", "seeds", "base_stream", "command_line"),
    *("config", "storage", "quantization", "messages", "models", "lora", "aggregation", "privacy"),
    *("tasks", "training", "federation", "tracking", "runtime"),
    *("report", "train", "tune", "attack", "probe"),
]
"""From the ground up, as in CONTRIBUTING.md."""


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_rooms_below_its_own(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("fedlpp_ray.")}
    above = ROOMS[ROOMS.index(room(path)) + 1 :]
    assert not ours & set(above)


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("ray", {"runtime"}),
        ("mlflow", {"tracking"}),
        ("peft", {"lora"}),
        ("transformers", {"models", "lora"}),
        ("bitsandbytes", {"models"}),
        ("deepspeed", {"models"}),
        ("dp_accounting", {"privacy"}),
        ("datasets", {"tasks"}),
        ("sklearn", {"tasks"}),
        ("Crypto", {"privacy"}),
    ],
)
def test_a_large_package_is_imported_in_one_room(package: str, rooms: set[str]) -> None:
    users = {room(p) for p in FILES if {n.split(".")[0] for n in imports(p)} & {package}}
    assert users == rooms


def test_the_quantizer_needs_torch_alone() -> None:
    files = (PACKAGE / "quantization").glob("*.py")
    names = {name.split(".")[0] for path in files for name in imports(path)}
    assert names & {"numpy", "transformers", "peft", "ray", "pydantic"} == set()
    assert "torch" in names
