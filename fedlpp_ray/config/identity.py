"""Which keys decide the bits of a run, and whether two experiments agree in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedlpp_ray.config.errors import ConfigError
from fedlpp_ray.config.schema import Experiment

_ITS_OWN = ("watch", "at_end")
"""Keys of `adversary` that say what a run measures itself."""
_SHOWN = 8
"""Differences that a message names; of two unrelated experiments there are dozens."""


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys: `{"lora": {"rank": 4}}` to `{"lora.rank": 4}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fingerprint(experiment: Experiment) -> str:
    """SHA-256 (hex) over all that the bits of a run depend on: one for each distinct run."""
    text = json.dumps(_decisive(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(there: Experiment, here: Experiment, where: str) -> None:
    """Refuse to go on with a run of another experiment. Where actors run may differ.

    Args:
        there: What the run was started with.
        here: What is asked for now.
        where: The place of the run, for the message.

    Raises:
        ConfigError: naming each key that differs, with both values.
    """
    old, new = _decisive(there), _decisive(here)
    shown = flat_config(there.model_dump(mode="json")), flat_config(here.model_dump(mode="json"))
    differing = [
        f"{key} is {shown[0][key]} in the checkpoint, {shown[1][key]} here"
        for key in new
        if old[key] != new[key]
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ConfigError(
            f"{where} is of another experiment: {'; '.join(differing[:_SHOWN])}{more}"
        )


def check_same_adversary(there: Experiment, here: Experiment, where: str) -> None:
    """Refuse to compare what different adversaries made of runs.

    What a run measures itself (`watch...`, `at_end`) may differ.

    Args:
        there: What was run, and by whom it is attacked.
        here: The same of the run that it is compared with.
        where: The place of the first, for the message.

    Raises:
        ConfigError: naming each key that differs, with both values, and how to give one for all.
    """
    old, new = (each.adversary.model_dump(mode="json") for each in (there, here))
    differing = [key for key in new if old[key] != new[key] and not key.startswith(_ITS_OWN)]
    if not differing:
        return
    shown = "; ".join(f"adversary.{x} is {old[x]} there, {new[x]} here" for x in differing)
    for_all = " ".join(f"adversary.{x}={_as_given(new[x])}" for x in differing)
    raise ConfigError(f"{where} has another adversary: {shown}. One for all, e.g.: {for_all}")


def _as_given(value: Any) -> str:
    """A value as a command line has it."""
    return "null" if value is None else str(value)


def _decisive(experiment: Experiment) -> dict[str, Any]:
    """Dotted keys without those of `adversary` and `runtime` that change no bit.

    Of a GPU only whether there is one decides, not the share of it.
    """
    flat = flat_config(experiment.model_dump(mode="json"))
    runtime = experiment.runtime
    apart = ("adversary.", "runtime.")
    return {key: value for key, value in flat.items() if not key.startswith(apart)} | {
        "runtime.threads": runtime.threads,
        "runtime.client_gpus": runtime.client_gpus > 0,
        "runtime.server_gpus": runtime.server_gpus > 0,
    }
