"""The result of a run: what `--json` writes."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fedlpp_ray import __version__
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import EVALUATED, Final, Floor, RoundRecord
from fedlpp_ray.federation.threat import threat_of_run
from fedlpp_ray.privacy import Protection, measure_protection
from fedlpp_ray.tasks import UTILITY

_PACKAGES = ("torch", "transformers", "peft", "ray", "numpy")


def run_protection(
    history: Sequence[RoundRecord], floor: Floor, final: Final | None = None
) -> Protection:
    """Protection of a finished run over the models measured in it.

    A client keeps what it receives, so its strongest model is taken over all evaluated rounds, and
    compared with the model that the server ends with: its final one, or that of the last round.
    Chosen on the held-out data, the maximum flatters the client a little: the error is on the side
    of less protection.
    """
    evaluated = [record for record in history if record.evaluation]
    attacks = {
        f"{model} of round {record.round}": metrics[UTILITY]
        for record in evaluated
        for model in EVALUATED[1:]
        if (metrics := getattr(record.evaluation, model)) is not None
    }
    attacks |= {
        f"{name} of round {record.round}": metrics[UTILITY]
        for record in evaluated
        if record.evaluation
        for name, metrics in record.evaluation.leak.items()
    }
    last = evaluated[-1].evaluation
    assert last is not None
    server = final.server if final else last.server
    return measure_protection(
        None if server is None else server[UTILITY],
        attacks,
        {"base": floor.base[UTILITY], "local_only": floor.local_only[UTILITY]},
    )


def leak_of(record: RoundRecord) -> tuple[str, float] | None:
    """The strongest of what the broadcasts up to a round give away by arithmetic alone.

    Returns:
        Its name and utility, of the attacks that were measured in the round and the newest
        broadcast as it is. None where none was. NaN, of a model that has diverged, only if all are.
    """
    if record.evaluation is None or not record.evaluation.leak:
        return None
    models = {"client_before": record.evaluation.client_before, **record.evaluation.leak}
    utilities = [(name, metrics[UTILITY]) for name, metrics in models.items() if metrics]
    return max(utilities, key=lambda x: -math.inf if math.isnan(x[1]) else x[1])


def to_json(outcome: dict[str, Any]) -> str:
    """A result as a JSON text, in which NaN, of a model that has diverged, is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, list | tuple):
            return [plain(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(outcome), indent=1)


def last_server(outcome: Mapping[str, Any]) -> Any:
    """Of a result, the metrics of the model that the server ends with; None where it has none."""
    return (outcome.get("final") or outcome["history"][-1])["server"]


def result(
    experiment: Experiment,
    history: Sequence[RoundRecord],
    floor: Floor,
    final: Final | None = None,
) -> dict[str, Any]:
    """The result of a finished run, as plain values."""
    return {
        "config": experiment.model_dump(mode="json"),
        "history": [record.to_dict() for record in history],
        "final": final.to_dict() if final else None,
        "floor": asdict(floor),
        "protection": asdict(run_protection(history, floor, final)),
        "threat": threat_of_run(experiment),
        "versions": {"fedlpp_ray": __version__, "python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "seed": experiment.seed,
    }
