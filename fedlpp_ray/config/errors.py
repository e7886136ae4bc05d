"""Validation errors in the user's words: which key, what was given, what is allowed."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from fedlpp_ray.errors import UserError


class ConfigError(UserError):
    """The experiment description is wrong. The message names the key and the allowed values."""


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line a fault: `where: key: fault (given: value)`."""
    return "\n".join(f"{where}: {_line(fault, model)}" for fault in error.errors())


def _line(fault: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
    key = ".".join(location)
    match fault["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {_allowed_keys(location, model)}"
        case "literal_error":
            return f"{key}: allowed: {fault['ctx']['expected']} (given: {fault['input']!r})"
        case "value_error":
            return str(fault["ctx"]["error"])
        case _:
            message = fault["msg"].replace("Input should be", "must be")
            return f"{key}: {message} (given: {fault['input']!r})"


def _allowed_keys(location: list[str], model: type[BaseModel]) -> str:
    *sections, leaf = location
    for section in sections:
        annotation = model.model_fields[section].annotation
        assert isinstance(annotation, type)
        model = annotation
    close = difflib.get_close_matches(leaf, model.model_fields, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"allowed here: {', '.join(model.model_fields)}{hint}"
