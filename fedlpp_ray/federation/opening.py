"""What is known of a round before its first update, and the broadcasts that its clients have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlpp_ray.aggregation.products import pad
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import Assignment
from fedlpp_ray.federation.wire import Broadcast, Wire
from fedlpp_ray.state import Schema, State


@dataclass(frozen=True)
class Opening:
    """What is known of a round before its first update; made by `Server.opening`.

    Attributes:
        experiment: What is run.
        schema: Of the server's whole model state.
        round: The server's, from 1.
        cohort: The clients that may return.
        broadcasts: The broadcasts that they train from, by the round in which each was made.
        examples: n_i of each client of the cohort.
        unsent: What clients have from the seed: never trained by all, never sent.
        clip: C in force; infinite without differential privacy.
    """

    experiment: Experiment
    schema: Schema
    round: int
    cohort: tuple[Assignment, ...]
    broadcasts: Mapping[int, Broadcast]
    examples: Mapping[int, int]
    unsent: State
    clip: float = math.inf


class Decoded:
    """D, by round and edition, as the clients of an opening have decoded it.

    Args:
        opening: The round.
        wire: Its messages.
    """

    def __init__(self, opening: Opening, wire: Wire) -> None:
        self._opening, self._experiment, self._wire = opening, opening.experiment, wire
        self._decoded: dict[tuple[int, int], State] = {}

    def own(self, started: int) -> State:
        """D at the server's own rank; empty where nobody reads it.

        Raises:
            MessageError: the broadcast is not what its round made.
        """
        if not self._opening.cohort or self._experiment.downlink.individual:
            return {}
        return self.of(started, self._experiment.lora.rank)

    def of(self, started: int, key: int) -> State:
        """What readers of an edition have decoded, at the server's rank; what never travels, as is.

        Decoded once, unless it has one reader. A residual that was not sent is not in it.

        Raises:
            MessageError: as `own`.
        """
        made = self._experiment.downlink.made_in(started)
        if (made, key) in self._decoded:
            return self._decoded[made, key]
        state = self._wire.read(made, key, self._opening.broadcasts[made][key])
        state = self._wire.rotate(made, key, state, back=True)
        state = self._opening.unsent | pad(state, self._experiment.lora.rank)
        if not self._experiment.downlink.individual:
            self._decoded[made, key] = state
        return state
