"""What an attack is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy.view import View
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
    """

    level: Level
    attack: Attack


ATTACKS: dict[str, Known] = {}
"""By name, from the weakest means to the strongest."""


def attack(name: str, level: Level) -> Callable[[Attack], Attack]:
    """Put a function on the ladder."""

    def register(found: Attack) -> Attack:
        ATTACKS[name] = Known(level, found)
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
