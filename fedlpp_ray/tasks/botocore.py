"""What AWS services do, from the data files of the package botocore: text with natural clients.

The package is not imported. The descriptions are Amazon's, under botocore's Apache-2.0 licence.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedlpp_ray.assets import AssetError, cache_folder, locate
from fedlpp_ray.tasks.references import Written

EXTRACTION = 1
"""Raise it with every change of what is extracted: a cache of another number is not read."""
INPUTS = 8
"""At most so many inputs are named in a prompt."""
WORDS = range(4, 41)
"""Words of a description; others are left out."""

_BLOCKS = {"p", "li", "ul", "ol", "dl", "dt", "dd", "note", "important", "h2", "pre", "br"}
_ABBREVIATIONS = r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bInc)"
_SENTENCE = re.compile(rf".*?{_ABBREVIATIONS}[.!?](?=\s|$)")

Row = tuple[str, str, str]
"""Service, prompt, description."""


def operations() -> Written:
    """A row an operation, its service the key; the operations' order is that of botocore's files.

    The prompt is `service: S3 | operation: GetObject | input: Bucket, Key`, of the required inputs
    where there are any, else of all, at most 8 of them; the reference is the first sentence of the
    description, if that has 4 to 40 words. Rows are kept in `cache_folder()` by the version of
    botocore.

    Raises:
        AssetError: botocore is not installed, or the cache cannot be written.
    """
    file = cache_folder() / f"{botocore_identity()}.json"
    if not file.is_file():
        _write(file, list(extract(_root())))
    services, prompts, descriptions = zip(*json.loads(file.read_text("utf-8")), strict=True)
    return Written(prompts, descriptions, services)


def botocore_identity() -> str:
    """What `operations` depends on: the version of botocore, and of the extraction.

    Raises:
        AssetError: botocore is not installed.
    """
    _root()
    return f"botocore-{version('botocore')}-{EXTRACTION}"


def _root() -> Path:
    try:
        root = locate("pkg://botocore/data")
    except AssetError:
        raise AssetError(
            "task.name 'botocore' reads the package botocore, which is not installed: pip install "
            "'fedlpp_ray[generation]', or botocore alone"
        ) from None
    assert root is not None
    return root


def _write(file: Path, rows: list[Row]) -> None:
    """Aside, then renamed: other processes may be reading or writing the same."""
    aside = file.with_suffix(f".{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(rows), "utf-8")
        aside.replace(file)
    except OSError as error:
        raise AssetError(f"{file}: {error}; set FEDLPP_RAY_CACHE to another folder") from error


def extract(root: Path) -> Iterator[Row]:
    """The rows of a folder `root/SERVICE/DATE/service-2.json.gz`, of each service's last date."""
    for service in sorted(root.iterdir()):
        if dates := sorted(service.glob("*/service-2.json.gz")):
            yield from _service(json.loads(gzip.decompress(dates[-1].read_bytes())))


def _service(model: dict[str, Any]) -> Iterator[Row]:
    name = model["metadata"]["serviceId"]
    for operation, details in model["operations"].items():
        description = first_sentence(details.get("documentation", ""))
        if len(description.split()) not in WORDS:
            continue
        shape = model["shapes"][details["input"]["shape"]] if "input" in details else {}
        inputs = list(shape.get("required") or shape.get("members", ()))[:INPUTS]
        parts = [f"service: {name}", f"operation: {operation}"]
        parts += [f"input: {', '.join(inputs)}"] if inputs else []
        yield name, " | ".join(parts), description


def first_sentence(html: str) -> str:
    """The first sentence of the first paragraph, as plain text without line breaks."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    paragraphs = (" ".join(part.split()) for part in "".join(parser.parts).split("\0"))
    paragraph = next(filter(None, paragraphs), "")
    sentence = _SENTENCE.match(paragraph)
    return sentence[0] if sentence else paragraph


class _Text(HTMLParser):
    """Collects what is between tags, with a zero character between paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts += ["\0"] if tag in _BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        self.parts += ["\0"] if tag in _BLOCKS else []
