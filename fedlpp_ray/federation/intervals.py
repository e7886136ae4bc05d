"""How sure the protection of an attacked run is, over its held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.ladder import Ladder, Outcome
from fedlpp_ray.privacy import Interval, Scores, bootstrap_protection, mean_over_seeds
from fedlpp_ray.tasks import UTILITY
from fedlpp_ray.training import Scored

NO_SUMS = "no sums over examples decide the utility"
ALL = "all"
"""The group of all attacks; a level's is the level's name, an attack's the attack's after this."""
_ATTACK = "attack: "


def protection_intervals(
    ladder: Ladder,
    outcomes: Sequence[Outcome],
    own: Mapping[str, Scored],
    adapter: Mapping[str, bytes],
    seed: int,
    *,
    lacking: str = "the server has no model",
) -> tuple[dict[str, Interval], dict[str, Interval], Interval]:
    """Of each attack, of each level, and of the strongest of all.

    The server's model and the run's floor are measured again for it, example by example.

    Args:
        ladder: That made the outcomes.
        outcomes: Of the attacks, at least one.
        own: `Ladder.scored_floor`.
        adapter: The server's final one, as `checkpoint.trained` reads it; empty where there is
            none.
        seed: Of the resamples.
        lacking: Why there is none.
    """
    groups = {f"{_ATTACK}{each.name}": [each.name] for each in outcomes}
    for level in dict.fromkeys(each.level for each in outcomes):
        groups[level] = [each.name for each in outcomes if each.level == level]
    groups[ALL] = [each.name for each in outcomes]
    if adapter:
        found = _resampled(ladder, outcomes, own, adapter, groups, seed=seed)
    else:
        found = dict.fromkeys(groups, Interval(None, None, reason=lacking))
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
    none = dict.fromkeys(groups, Interval(None, None, reason=NO_SUMS))
    attacks = {each.name: each.scores for each in outcomes if each.scores is not None}
    if len(attacks) < len(outcomes):
        return none
    (_, server), floors = ladder.compared(adapter)
    floor = {name: scores for name, (_, scores) in (floors | dict(own)).items()}
    known: dict[str, Scores] = {name: x for name, x in floor.items() if x is not None}
    if server is None or len(known) < len(floor):
        return none
    return bootstrap_protection(server, attacks, known, groups, seed=seed)


def over_seeds(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Protection over runs that differ in their seed: of each attack, each level and in all.

    Args:
        reports: Of `fedlpp_ray.attack`, by seed.

    Returns:
        `seeds`; `threat`, by seed where it differs, as of which client is the strongest; and of
        `mean_over_seeds` by name `protection` and `utilities`, these of the server and the floor,
        too.

    Raises:
        UserError: the runs were not attacked by the same attacks.
    """
    found = {seed: _by_name(report) for seed, report in reports.items()}
    (first, names), *others = found.items()
    for seed, other in others:
        if alone := names.keys() ^ other.keys():
            raise UserError(
                f"seeds {first} and {seed} were not attacked by the same attacks, so they have no "
                f"mean: {', '.join(sorted(alone))} only of one"
            )
    utilities = {name: [each[name][0] for each in found.values()] for name in names}
    for key in ("server", "floor"):
        utilities[key] = [_utility(report["protection"][key]) for report in reports.values()]
    protections = {name: [each[name][1] for each in found.values()] for name in names}
    threats = {seed: report["threat"] for seed, report in reports.items()}
    by_seed = "\n".join(f"seed {seed}: {threat}" for seed, threat in threats.items())
    alike = len(set(threats.values())) == 1
    return {
        "seeds": list(reports),
        "threat": threats[first] if alike else by_seed,
        "utilities": {name: asdict(mean_over_seeds(x)) for name, x in utilities.items()},
        "protection": {name: asdict(mean_over_seeds(x)) for name, x in protections.items()},
    }


def _by_name(report: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Utility and protection of each attack, and of the strongest of each level and of all."""
    strongest = {f"strongest, {level}": each for level, each in report["levels"].items()}
    strongest["strongest of all"] = report["protection"]
    attacks = {x["name"]: (x["metrics"][UTILITY], x["protection"]) for x in report["attacks"]}
    return attacks | {
        name: (_utility(each["strongest"]), each["value"]) for name, each in strongest.items()
    }


def _utility(found: Any) -> float | None:
    """A utility, or that of a named one."""
    utility: float | None = found[1] if isinstance(found, tuple | list) else found
    return utility
