"""Tables of a page, each between its marks, and the command line that writes one there."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).parent / "README.md"
PACKAGES = ("torch", "ray", "peft", "bitsandbytes")


def marks(name: str) -> tuple[str, str]:
    """The lines between which a page has the table of `name`."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def replaced(page: str, name: str, table: str) -> str:
    """The page with another table between its marks.

    Raises:
        ValueError: it has no marks.
    """
    begin, end = marks(name)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no '{begin}' and '{end}'")
    return f"{before}{begin}\n{table}\n{end}{after}"


def write(page: Path, name: str, table: str) -> None:
    """Put a table into a page; raises as `replaced`."""
    page.write_text(replaced(page.read_text(encoding="utf-8"), name, table), encoding="utf-8")


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """`--quick` and `--into FILE`."""
    found = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--quick", action="store_true", help="a smoke test; its numbers mean little")
    found.add_argument("--into", type=Path, metavar="FILE", help="has the table between marks")
    return found


def deliver(name: str, options: argparse.Namespace, make: Callable[[], str]) -> None:
    """Measure, then print the table, with the machine under it, and write it where asked."""
    load = os.getloadavg()[0]
    table = f"\n{make()}\n\n{machine()}. Load average before: {load:.1f}.\n"
    if options.quick:
        table += "\nTaken with `--quick`: a smoke test, no measurement.\n"
    print(table)
    if options.into:
        write(options.into, name, table)


def machine() -> str:
    """Processor and packages in a line."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vector = "AVX512" if "avx512f" in flags else "no AVX512"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}, {vector}), "
        f"Python {platform.python_version()}, {packages}"
    )


def rows(columns: list[str], cells: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
