"""What an attack is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy.view import Means, View
from fedlpp_ray.state import State

Attack = Callable[[View], State]
"""What an adversary has to the state of the best model that this attack makes of it."""
Level = Literal["broadcast", "trained"]
"""What an attack costs: arithmetic on broadcasts and at most validation, or training."""


@dataclass(frozen=True)
class Known:
    """An attack of the ladder.

    Attributes:
        level: What it costs.
        attack: It.
        needs: What not every adversary has. One that uses more is refused by what it is given.
    """

    level: Level
    attack: Attack
    needs: frozenset[Means] = frozenset()


_KEYS: dict[Means, str] = {
    "architecture": "adversary.architecture 'known'",
    "auxiliary": "adversary.auxiliary",
    "masks": "messages that lack something (downlink.server_mask, client_mask, lora.client_ranks)",
    "average": "server.final_average",
    "returns": "a server that adds the mean of updates of one broadcast, and nothing to it",
}
"""What gives an adversary its means."""
ATTACKS: dict[str, Known] = {}
"""By name, from the weakest means to the strongest."""


def attack(name: str, level: Level, *needs: Means) -> Callable[[Attack], Attack]:
    """Put a function on the ladder."""

    def register(found: Attack) -> Attack:
        ATTACKS[name] = Known(level, found, frozenset(needs))
        return found

    return register


def find_attacks(names: list[str] | None = None) -> dict[str, Known]:
    """Those with these names; None: all.

    Raises:
        UserError: there is none of a name.
    """
    for name in names or ():
        if name not in ATTACKS:
            raise UserError(f"attack '{name}' is not one of: {', '.join(ATTACKS)}")
    return ATTACKS if names is None else {name: ATTACKS[name] for name in names}


def feasible(
    attacks: Mapping[str, Known], means: frozenset[Means]
) -> tuple[dict[str, Known], dict[str, str]]:
    """Those that an adversary with these means can make, and of the others what they need."""
    lacking = {name: sorted(known.needs - means) for name, known in attacks.items()}
    able = {name: known for name, known in attacks.items() if not lacking[name]}
    return able, {
        name: f"needs {' and '.join(_KEYS[each] for each in found)}"
        for name, found in lacking.items()
        if found
    }
