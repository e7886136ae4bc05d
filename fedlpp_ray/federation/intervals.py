"""How sure the protection of an attacked run is, over its held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedlpp_ray.federation.ladder import Ladder, Outcome
from fedlpp_ray.privacy import Interval, Scores, bootstrap_protection, mean_over_seeds
from fedlpp_ray.training import Scored

NO_MEAN = "the utility is no mean over examples"
ALL = "all"
"""The group of all attacks; a level's is the level's name, an attack's the attack's after this."""
_ATTACK = "attack: "


def protection_intervals(
    ladder: Ladder,
    outcomes: Sequence[Outcome],
    own: Mapping[str, Scored],
    adapter: Mapping[str, bytes],
    seed: int,
) -> tuple[dict[str, Interval], dict[str, Interval], Interval]:
    """Of each attack, of each level, and of the strongest of all.

    The server's model and the run's floor are measured again for it, example by example.

    Args:
        ladder: That made the outcomes.
        outcomes: Of the attacks, at least one.
        own: `Ladder.scored_floor`.
        adapter: The server's final one, as `checkpoint.trained` reads it; empty where protection is
            undefined for want of a server's model.
        seed: Of the resamples.
    """
    groups = {f"{_ATTACK}{each.name}": [each.name] for each in outcomes}
    for level in dict.fromkeys(each.level for each in outcomes):
        groups[level] = [each.name for each in outcomes if each.level == level]
    groups[ALL] = [each.name for each in outcomes]
    found = _resampled(ladder, outcomes, own, adapter, groups, seed=seed)
    attacks = {key.removeprefix(_ATTACK): x for key, x in found.items() if key.startswith(_ATTACK)}
    levels = {key: x for key, x in found.items() if not key.startswith(_ATTACK) and key != ALL}
    return attacks, levels, found[ALL]


def _resampled(
    ladder: Ladder,
    outcomes: Sequence[Outcome],
    own: Mapping[str, Scored],
    adapter: Mapping[str, bytes],
    groups: Mapping[str, Sequence[str]],
    *,
    seed: int,
) -> dict[str, Interval]:
    def none(reason: str) -> dict[str, Interval]:
        return dict.fromkeys(groups, Interval(None, None, reason=reason))

    if not adapter:
        return none("the server has no model")
    attacks = {each.name: each.scores for each in outcomes if each.scores is not None}
    if len(attacks) < len(outcomes):
        return none(NO_MEAN)
    (_, server), floors = ladder.compared(adapter)
    floor = {name: scores for name, (_, scores) in (floors | dict(own)).items()}
    known: dict[str, Scores] = {name: x for name, x in floor.items() if x is not None}
    if server is None or len(known) < len(floor):
        return none(NO_MEAN)
    return bootstrap_protection(server, attacks, known, groups, seed=seed)


def over_seeds(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Protection over runs that differ in their seed: of each attack, each level and in all.

    Args:
        reports: Of `fedlpp_ray.attack`, by seed; of the same attacks.
    """
    first = next(iter(reports.values()))
    values: dict[str, list[float | None]] = {}
    for report in reports.values():
        for each in report["attacks"]:
            values.setdefault(each["name"], []).append(each["protection"])
        for level, each in report["levels"].items():
            values.setdefault(f"strongest, {level}", []).append(each["value"])
        values.setdefault("strongest of all", []).append(report["protection"]["value"])
    return {
        "seeds": list(reports),
        "threat": first["threat"],
        "utilities": {
            key: asdict(mean_over_seeds([_utility(x["protection"][key]) for x in reports.values()]))
            for key in ("server", "strongest", "floor")
        },
        "protection": {name: asdict(mean_over_seeds(found)) for name, found in values.items()},
    }


def _utility(found: Any) -> float | None:
    """A utility, or that of a named one."""
    utility: float | None = found[1] if isinstance(found, tuple | list) else found
    return utility
