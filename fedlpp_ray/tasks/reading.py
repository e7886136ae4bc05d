"""Rows of a file, a folder or the hub, through `datasets`, and the checks of their columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedlpp_ray.assets import locate
from fedlpp_ray.config import TaskConfig
from fedlpp_ray.tasks.examples import TaskError

CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps its own conversion of a data set: SUBSET/SPLIT/NUMBER.parquet."""
_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def filled(config: TaskConfig, **values: str | None) -> TaskConfig:
    """The configuration with `values` for those keys that it leaves open.

    Raises:
        TaskError: what is held out would be trained on.
    """
    still_open = {key: value for key, value in values.items() if getattr(config, key) is None}
    config = config.model_copy(update=still_open)
    if config.train_split == config.held_out_split:
        raise TaskError(
            f"task.train_split = '{config.train_split}' is what task.name '{config.name}' is "
            "evaluated on; name another task.held_out_split"
        )
    return config


def read(config: TaskConfig, split: str) -> Any:
    """One split of the data, a `datasets.Dataset`.

    Raises:
        AssetError: a package or path is missing.
        TaskError: the data cannot be read, or have no such split.
    """
    import datasets  # a second to import, and the embedded text does not need it

    assert config.data is not None
    path = locate(config.data)
    suffix = Path(config.data).suffix
    if path is None and suffix in _FORMATS:
        raise TaskError(f"task.data = '{config.data}': no such file")
    if path is not None and config.revision is not None:
        raise TaskError(
            f"task.revision = '{config.revision}' belongs to hub names; '{config.data}' is local"
        )
    try:
        if path is None or path.is_dir():
            return datasets.load_dataset(str(path or config.data), split=split, **_where(config))
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
    except StopIteration:  # of `datasets`, where a file of JSON is empty
        raise TaskError(f"task.data = '{config.data}' ({split}): has no rows") from None
    # A data set that needs its loading script is a RuntimeError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else error
        raise TaskError(f"task.data = '{config.data}' ({split}): {reason}") from error


def _where(config: TaskConfig) -> dict[str, Any]:
    """Which part of a hub data set, or of a folder, to load.

    `datasets` tells splits by their names, and would take a converted "challenge_train" for
    training data; so the files of that branch are named.
    """
    if config.revision != CONVERTED:
        return {"name": config.subset, "revision": config.revision}
    splits = filter(None, (config.train_split, config.held_out_split))
    files = {split: f"{config.subset or 'default'}/{split}/*.parquet" for split in splits}
    return {"data_files": files, "revision": config.revision}


def check_column(data: Any, config: TaskConfig, key: str, column: str, split: str) -> None:
    """Refuse a column that the data do not have; `key` is the one of `task` that names it.

    Raises:
        TaskError: naming the columns that there are.
    """
    if column not in data.column_names:
        raise TaskError(
            f"task.{key} = '{column}' is not in '{config.data}' ({split}); "
            f"its columns: {', '.join(data.column_names)}"
        )


def check_present(
    rows: Iterable[tuple[Any, ...]], what: str, config: TaskConfig, split: str
) -> None:
    """Refuse rows in which a value is missing.

    Raises:
        TaskError: saying in how many, and which is the first.
    """
    missing = [number for number, row in enumerate(rows, 1) if any(x in (None, "") for x in row)]
    if missing:
        raise TaskError(
            f"'{config.data}' ({split}): a {what} is missing in {len(missing)} examples, "
            f"the first of which is number {missing[0]}"
        )


def read_keys(data: Any, config: TaskConfig) -> list[str] | None:
    """The key of each training example, if a column is named for it.

    Raises:
        TaskError: there is no such column, or a key is missing.
    """
    if config.key_column is None:
        return None
    check_column(data, config, "key_column", config.key_column, config.train_split)
    check_present(zip(data[config.key_column]), "key", config, config.train_split)
    return named(data, config.key_column, config, config.train_split)


def named(data: Any, column: str, config: TaskConfig, split: str) -> list[str]:
    """A column's values as text, those of a `ClassLabel` by their names.

    Raises:
        TaskError: a value is none of the `ClassLabel`.
    """
    feature = data.features[column]
    name = feature.int2str if hasattr(feature, "int2str") else str
    try:
        return [name(value) for value in data[column]]
    except ValueError as error:
        raise TaskError(
            f"'{config.data}' ({split}) is not labelled in '{column}': {error}"
        ) from error
