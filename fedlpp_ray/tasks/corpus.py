"""A task's text as a federation's parties use it: tokenized once on a node, then mapped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fedlpp_ray.cache import Tensors, share
from fedlpp_ray.config import GenerationConfig, TaskConfig
from fedlpp_ray.tasks.batches import Encoded, encode
from fedlpp_ray.tasks.examples import Examples, Prompts, Task
from fedlpp_ray.tasks.registry import data_identity, load_task
from fedlpp_ray.tasks.tokens import Tokens, pack
from fedlpp_ray.tasks.wording import Wording

KIND, VERSION = "tokens", 1
"""Folder in the cache, and the version of what is written there. Raise it with every change of
that, of a task's loader, or of how text becomes tokens."""
_CHUNK = 4096
_WORDED = ("chat_template", "separator", "max_new_tokens")
"""The keys of `generation` that decide tokens."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of a task.

    Attributes:
        classes: Number of classes, or None where a text is to be written.
        pad: Token id to pad with.
        train: What the clients share.
        held_out: What models are evaluated on: tokens of a classification task; prompts with
            their references, which are text, of a generation task.
    """

    classes: int | None
    pad: int
    train: Tokens
    held_out: Tokens | Prompts


def load_corpus(
    config: TaskConfig,
    generation: GenerationConfig,
    tokenizer: Callable[[], Any],
    identity: object | None,
) -> Corpus:
    """The tokens of a task; neither its text nor a tokenizer is loaded where they are cached.

    Text from the hub is loaded all the same, since nothing else tells which it is.

    Args:
        config: Which task, and how long its texts are.
        generation: How its prompts are worded.
        tokenizer: Loads the tokenizer.
        identity: What tells it from others (`model_identity`). None: nothing does, so that what it
            makes is not kept.

    Raises:
        AssetError, TaskError: the data or the tokenizer cannot be used.
    """
    if identity is None:
        return _read(_made(load_task(config), config, generation, tokenizer))
    data, task = data_identity(config), None
    if data is None:
        task = load_task(config)
        data = _digest(task)
    content = {
        "version": VERSION,
        "task": config.model_dump(mode="json"),
        "data": data,
        "tokenizer": identity,
        "wording": [getattr(generation, key) for key in _WORDED],
        "packages": [version(name) for name in ("datasets", "tokenizers", "transformers")],
    }

    def make() -> Tensors:
        return _made(task or load_task(config), config, generation, tokenizer)

    return _read(share(KIND, content, make))


def _made(
    task: Task, config: TaskConfig, generation: GenerationConfig, tokenizer: Callable[[], Any]
) -> Tensors:
    """All that a `Corpus` has as tensors by name."""
    words, length = tokenizer(), config.max_length
    about: dict[str, Any] = {"pad": words.pad_token_id, "classes": None}
    if isinstance(task.held_out, Prompts):
        encoded: Callable[[Any], Encoded] = Wording(words, generation, length).encode
        about["held_out"] = dataclasses.asdict(task.held_out)
        parts: dict[str, Any] = {"train": task.train}
    else:
        encoded = partial(encode, tokenizer=words, max_length=length)
        about["classes"] = len(task.labels)
        parts = {"train": task.train, "held_out": task.held_out}
    found = {"about": _bytes(about)}
    for name, part in parts.items():
        arrays = pack(_chunks(part, encoded), part.labels, part.keys)
        found |= {f"{name}.{key}": array for key, array in arrays.items()}
    return found


def _chunks(part: Examples | Prompts, encoded: Callable[[Any], Encoded]) -> Iterator[Encoded]:
    for first in range(0, len(part), _CHUNK):
        yield encoded(part.take(range(len(part))[first : first + _CHUNK]))


def _read(tensors: Tensors) -> Corpus:
    about = json.loads(tensors["about"].numpy().tobytes())
    held_out = about.get("held_out")
    return Corpus(
        about["classes"],
        about["pad"],
        Tokens(_of("train", tensors)),
        _prompts(held_out) if held_out else Tokens(_of("held_out", tensors)),
    )


def _of(part: str, tensors: Tensors) -> Tensors:
    return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}


def _prompts(found: dict[str, Any]) -> Prompts:
    references = tuple(map(tuple, found["references"]))
    keys = None if found["keys"] is None else tuple(found["keys"])
    return Prompts(tuple(found["prompts"]), references, tuple(found["labels"]), keys)


def _bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _digest(task: Task) -> str:
    found = hashlib.sha256(json.dumps(task.labels).encode())
    for part in (task.train, task.held_out):
        for field in dataclasses.fields(part):
            found.update(json.dumps(getattr(part, field.name)).encode())
    return found.hexdigest()
