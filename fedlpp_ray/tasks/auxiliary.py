"""Text like a task's that nobody has labelled: what an adversary has of its own."""

from __future__ import annotations

from fedlpp_ray.config import TaskConfig
from fedlpp_ray.config.templates import parse_template
from fedlpp_ray.tasks.examples import Examples, Prompts, TaskError
from fedlpp_ray.tasks.reading import check_column, check_present, read
from fedlpp_ray.tasks.registry import text_columns

KEY = "adversary.auxiliary"
_SPLIT = "train"


def load_auxiliary(config: TaskConfig, data: str) -> Examples | Prompts:
    """Texts of `data`, none twice: examples whose label is 0, or prompts without an answer.

    Args:
        config: The task, which says in which columns they are (`text_columns`), or by which
            template prompts are made; where it has none they are in a column "prompt".
        data: As `task.data`. Nothing else of it is read.

    Raises:
        AssetError, TaskError: the data cannot be read, have no such column, or lack a text.
    """
    pieces = parse_template(config.prompt or "{prompt}")
    if config.kind == "classification":
        columns = {key: x for key, x in text_columns(config).items() if x is not None}
    else:
        columns = {name: name for _, name in pieces if name is not None}
    of_data = TaskConfig(name="classification", data=data)
    try:
        rows = read(of_data, _SPLIT)
        for column in columns.values():
            check_column(rows, of_data, "text_column", column, _SPLIT)
        found = [tuple(map(str, x)) for x in zip(*(rows[c] for c in columns.values()), strict=True)]
        check_present(found, "text", of_data, _SPLIT)
        if not found:
            raise TaskError(f"'{data}' ({_SPLIT}): has no rows")
    except TaskError as error:
        raise TaskError(f"{KEY}: {error}") from error
    found = list(dict.fromkeys(found))
    nothing = (0,) * len(found)
    if config.kind == "classification":
        texts, *pairs = zip(*found, strict=True)
        return Examples(texts, nothing, pairs=pairs[0] if pairs else None)
    rows = [dict(zip(columns, row, strict=True)) for row in found]
    prompts = ("".join(text + (row[name] if name else "") for text, name in pieces) for row in rows)
    return Prompts(tuple(prompts), ((),) * len(found), nothing)
