"""The threat model in words: a number about an adversary says nothing without it."""

from __future__ import annotations

from collections.abc import Sequence

from fedlpp_ray.config import Experiment
from fedlpp_ray.privacy.view import Base

_BASES: dict[Base, str] = {
    "client": "their base",
    "public": "W0 in full precision",
    "corrected": "W0 + R, as the server corrects it",
}


def threat_of(
    experiment: Experiment,
    *,
    clients: Sequence[int],
    bases: Sequence[Base],
    texts: int,
    broadcasts: int,
) -> str:
    """Of the ladder on a finished run.

    Args:
        experiment: What was run, with the adversary's section.
        clients: The colluders.
        bases: The models that they have.
        texts: Number of auxiliary texts.
        broadcasts: Number that they have read.
    """
    config = experiment.adversary
    who = f"client {clients[0]}" if len(clients) == 1 else f"{len(clients)} colluding clients"
    text = f"{texts} texts of '{config.auxiliary}'" if config.auxiliary else "no auxiliary text"
    return (
        f"adversary {who}, passive; architecture {config.architecture}; "
        f"has {' and '.join(_BASES[each] for each in bases)}, {text}; "
        f"{broadcasts} broadcasts (adversary.rounds '{config.rounds}')"
    )


def threat_of_result(experiment: Experiment, ladder: str | None) -> str:
    """Of a result's protection: of what the run measured, and of the ladder at its end.

    Args:
        experiment: What was run.
        ladder: The ladder's, or why there was no attack; None where `adversary.at_end` asks for
            none.
    """
    own = threat_of_run(experiment)
    return own if ladder is None else f"{own}; and at the end {ladder}"


def threat_of_run(experiment: Experiment) -> str:
    """Of what a run measures as it goes: the client's models, and what `adversary.watch` names."""
    if experiment.method != "federated":
        return f"none: method '{experiment.method}' sends nothing"
    config = experiment.adversary
    watched = f"; {' and '.join(config.watch)}" if config.watch else ""
    many = f" with {config.colluders} colluders" if watched and config.colluders > 1 else ""
    return (
        f"adversary the strongest client, passive; architecture {config.architecture}; has its "
        f"base, no auxiliary text; each broadcast, before and after training{watched}{many}"
    )
