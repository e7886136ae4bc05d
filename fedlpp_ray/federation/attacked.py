"""What the attack ladder makes of a run: at its end (`adversary.at_end`), or of its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.config.adversary import ALL
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.ladder import Ladder, Outcome, check_adversary
from fedlpp_ray.federation.means import attacks_of
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy.attacks import Known

COMMAND = "python -m fedlpp_ray.attack"


@dataclass(frozen=True)
class Attacked:
    """What the ladder came to.

    Attributes:
        threat: The threat model in words, which belongs beside every number; or why the adversary
            has nothing to attack with.
        outcomes: Of each attack in each base, without each example's score.
        floor: Utility of what the adversary's examples give it alone, by name.
        seconds: That it took.
        left_out: What the adversary cannot make, and why.
    """

    threat: str
    outcomes: tuple[Outcome, ...]
    floor: Mapping[str, float]
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)


def check_at_end(experiment: Experiment) -> None:
    """Refuse a run that could not be attacked at its end.

    Raises:
        ConfigError: naming the keys.
    """
    if not experiment.adversary.at_end:
        return
    try:
        _, left_out = _asked(experiment)
    except UserError as error:
        raise ConfigError(f"adversary.at_end: {error}; or all") from None
    if experiment.adversary.at_end != ALL:
        for name, reason in left_out.items():
            raise ConfigError(f"adversary.at_end: '{name}' {reason}")
    check_adversary(experiment)
    for name, party in (("client", experiment.client), ("server", experiment.server)):
        if party.zero.stage == 3:
            raise ConfigError(
                f"adversary.at_end with {name}.zero.stage = 3: attacks need the base whole on one "
                f"device; leave it out, and where there is one: {COMMAND} RUN"
            )


def attack(
    experiment: Experiment, broadcasts: Mapping[int, Broadcast], history: Sequence[RoundRecord]
) -> Attacked:
    """Attack a finished run as `adversary.at_end` asks, with models of its own.

    Args:
        experiment: What was run.
        broadcasts: All that were sent, by the round in which they were made.
        history: The run's rounds.
    """
    start = time.perf_counter()
    try:
        ladder = Ladder(experiment, broadcasts, history)
    except UserError as error:  # it costs the attacks, not the run
        return Attacked(f"no attack: {error}", (), {}, time.perf_counter() - start)
    attacks, left_out = _asked(experiment)
    outcomes = tuple(replace(each, scores=None) for each in ladder.run(attacks))
    floor = ladder.floor()
    return Attacked(ladder.threat, outcomes, floor, time.perf_counter() - start, left_out)


def _asked(experiment: Experiment) -> tuple[dict[str, Known], dict[str, str]]:
    asked = experiment.adversary.at_end
    return attacks_of(experiment, None if asked == ALL else list(asked))
