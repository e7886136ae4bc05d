"""The result of a run: what `--json` writes."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fedlpp_ray import __version__
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import EVALUATED, Final, Floor, RoundRecord
from fedlpp_ray.federation.threat import threat_of_result
from fedlpp_ray.privacy import Protection, measure_protection
from fedlpp_ray.tasks import UTILITY

if TYPE_CHECKING:
    from fedlpp_ray.federation.attacked import Attacked
    from fedlpp_ray.federation.ladder import Outcome

_PACKAGES = ("torch", "transformers", "peft", "ray", "numpy")


def run_protection(
    history: Sequence[RoundRecord],
    floor: Floor,
    final: Final | None = None,
    ladder: Attacked | None = None,
) -> Protection:
    """Protection of a finished run over the models measured in it, and at its end.

    A client keeps what it receives, so its strongest model is taken over all evaluated rounds, and
    compared with the model that the server ends with: its final one, or that of the last round.
    Chosen on the held-out data, this maximum flatters the client a little: an error on the side of
    less protection. That over floors makes the denominator smaller, and |protection| larger.
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
    own = {"base": floor.base[UTILITY], "local_only": floor.local_only[UTILITY]}
    if ladder:
        attacks |= {each.name: each.utility for each in ladder.outcomes}
        own |= ladder.floor
    last = evaluated[-1].evaluation
    assert last is not None
    server = final.server if final else last.server
    return measure_protection(None if server is None else server[UTILITY], attacks, own)


def leak_of(record: RoundRecord) -> tuple[str, float] | None:
    """The strongest of what the broadcasts up to a round give away by arithmetic alone.

    Returns:
        Its name and utility, of the attacks that were measured in the round and the newest
        broadcast as it is. None where none was. NaN, of a model that has diverged, only if all are.
    """
    if record.evaluation is None or not record.evaluation.leak:
        return None
    models = {"client_before": record.evaluation.client_before, **record.evaluation.leak}
    utilities = [(name, utility_of(metrics)) for name, metrics in models.items() if metrics]
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
    ladder: Attacked | None = None,
) -> dict[str, Any]:
    """The result of a finished run, as plain values."""
    outcome = {
        "config": experiment.model_dump(mode="json"),
        "history": [record.to_dict() for record in history],
        "final": final.to_dict() if final else None,
        "floor": asdict(floor),
        "protection": asdict(run_protection(history, floor, final, ladder)),
        "threat": threat_of_result(experiment, ladder.threat if ladder else None),
        "seconds": _seconds(history, ladder),
        "versions": {"fedlpp_ray": __version__, "python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "seed": experiment.seed,
    }
    report = None
    if ladder:
        report = attack_report(experiment, outcome, ladder.outcomes, ladder.floor)
        report |= {"threat": ladder.threat, "left_out": dict(ladder.left_out)}
    return outcome | {"ladder": report}


def _seconds(history: Sequence[RoundRecord], ladder: Attacked | None) -> dict[str, float | None]:
    """Of all rounds; of these for what leaks, and its share; and of the ladder after them.

    Where a round is evaluated while the next one trains, the share is of work, not of waiting.
    """
    run, leak = (sum(r.seconds.get(key, 0.0) for r in history) for key in ("total", "leak"))
    share = leak / run if run else 0.0
    return {
        "run": run,
        "leak": leak,
        "leak_share": share,
        "ladder": ladder.seconds if ladder else None,
    }


def attack_report(
    experiment: Experiment,
    outcome: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    own: Mapping[str, float],
) -> dict[str, Any]:
    """What attacks came to as plain values, with protection against each, each level, and all.

    Args:
        experiment: What was run, and by whom it was attacked.
        outcome: The run's result.
        outcomes: Of the attacks.
        own: Utility of what the adversary's examples give it alone, by name.
    """
    last = last_server(outcome)
    server = None if last is None else utility_of(last)
    floor = dict(own) | {
        name: utility_of(outcome["floor"][name]) for name in ("base", "local_only")
    }

    def protection(chosen: Sequence[Outcome]) -> dict[str, Any]:
        return asdict(measure_protection(server, {x.name: x.utility for x in chosen}, floor))

    levels = dict.fromkeys(each.level for each in outcomes)
    return {
        "adversary": experiment.adversary.model_dump(mode="json"),
        "attacks": [
            {"name": each.name, **_plain(each), "protection": protection([each])["value"]}
            for each in outcomes
        ],
        "levels": {
            level: protection([each for each in outcomes if each.level == level])
            for level in levels
        },
        "protection": protection(outcomes),
    }


def _plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome without each example's score."""
    return {key: value for key, value in vars(outcome).items() if key != "scores"}


def utility_of(metrics: Mapping[str, Any]) -> float:
    """NaN, of a model that has diverged, is null in a result."""
    found = metrics[UTILITY]
    return math.nan if found is None else float(found)
