"""Names that stand for several keys, and how a trial's choices become an experiment.

Tune searches flat keys, one at a time. What goes together (a rank and its alpha), or is an
alternative of other keys (one defence or another), is a bundle: its choices have names, which are
what a searcher sees, and what tables and plots show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.tracking.metrics import THREAT

TRIAL = "trial"
"""Key of a resolved trial's number, beside its dotted keys, in Tune's configuration of it."""

COLUMNS = (TRIAL, "status", "error", "non_dominated", THREAT)
"""Of a sweep's table, beside what is searched and what trials report."""

Bundles = dict[str, dict[Any, dict[str, Any]]]
"""By the name of a bundle and the name of a choice: dotted keys and their values."""


@dataclass(frozen=True)
class Variants:
    """The experiments that a sweep's choices stand for.

    Attributes:
        base: The experiment that trials vary.
        bundles: What the names of choices stand for.
    """

    base: Experiment
    bundles: Bundles

    def experiment(self, config: Mapping[str, Any], where: str = "trial") -> Experiment:
        """The experiment of one of Tune's trial configurations.

        Raises:
            ConfigError: it is an invalid one, or a bundle has no such choice; the message names
                `where` and the key.
        """
        values = values_of(config)
        for name in set(values) & set(self.bundles):
            if _choice(self.bundles[name], values[name]) is None:
                allowed = ", ".join(map(str, self.bundles[name]))
                raise ConfigError(
                    f"{where}: {name}: {values[name]} is not in its bundle; allowed: {allowed}"
                )
        return self.base.with_values(unbundled(values, self.bundles), where)


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys and choices of one of Tune's trial configurations."""
    return {key: value for key, value in config.items() if key != TRIAL}


def unbundled(values: Mapping[str, Any], bundles: Bundles) -> dict[str, Any]:
    """Dotted keys, with those of a choice in the place of its name.

    What a bundle has no choice for stays: it may be the value of a key of the bundle's name.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        chosen = _choice(bundles.get(key, {}), value)
        found |= {key: value} if chosen is None else chosen
    return found


def without(bundles: Bundles, keys: Collection[str]) -> Bundles:
    """Bundles that leave some keys alone; one of which nothing remains is gone."""
    left = {
        name: {
            choice: {key: value for key, value in values.items() if key not in keys}
            for choice, values in choices.items()
        }
        for name, choices in bundles.items()
        if name not in keys
    }
    return {name: choices for name, choices in left.items() if any(choices.values())}


def read_bundles(bundles: Any, searched: Iterable[str], path: Path) -> Bundles:
    """The bundles of a search space.

    Raises:
        ConfigError: they have another form, one is not searched, or two would set the same key.
    """
    if not _well_formed(bundles):
        raise ConfigError(
            f"{path}: bundles must be dicts of keys by choice by name, e.g. "
            "{'defence': {'none': {}, 'rotate': {'downlink.rotate': 'round'}}}"
        )
    setters = {key: key for key in searched if key not in bundles}
    for name, choices in bundles.items():
        if name not in searched:
            raise ConfigError(f"{path}: bundles: param_space does not search '{name}'")
        for key in {key for values in choices.values() for key in values}:
            if (other := setters.setdefault(key, name)) != name:
                raise ConfigError(f"{path}: bundles: {key} is set by '{name}' and by '{other}'")
    return dict(bundles)


def _well_formed(bundles: Any) -> bool:
    return isinstance(bundles, dict) and all(
        isinstance(choices, dict) and all(isinstance(values, dict) for values in choices.values())
        for choices in bundles.values()
    )


def _choice(choices: Mapping[Any, dict[str, Any]], value: Any) -> dict[str, Any] | None:
    """A choice's keys; None where there is none of that name. `value` may be a list."""
    return next((values for name, values in choices.items() if name == value), None)
