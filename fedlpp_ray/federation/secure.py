"""Secure aggregation in a round: which half is where, and when each of its steps is taken.

All who are sampled take the steps "keys" and "shares" before anyone trains. Who is absent, late,
lost or refused, or whose training diverges, sends no masked update and has dropped out: those that
came are the survivors, they unmask the sum, and the server makes of it all that it makes of a mean.
With fewer updates than `federation.min_updates`, which is the threshold at least, nobody unmasks
anything and the round is abandoned.

The host that trains a client masks its update; the server (`SecureSum`) is given nothing else. A
client's half is held for it between steps as its memory is, for hosts serve many clients, and no
message carries it. Its secrets are the system's random numbers: no bit of a state follows from
them. A client that is begun again in a round, because its actor was lost, begins from the same half
and, as training is deterministic, sends the same bytes, which tell nothing new. A round that is
begun again, because the server was lost or the run was resumed, is another session with other
secrets; what two sums of one round differ by, where others drop out, the server learns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedlpp_ray.aggregation import METHODS, Method
from fedlpp_ray.aggregation.methods.base import keep
from fedlpp_ray.config import FULL_PRECISION, ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.private import private
from fedlpp_ray.federation.records import ClientReport
from fedlpp_ray.privacy.secure import Grid, SecureClient, Session

Exchange = Callable[[Mapping[int, bytes]], Mapping[int, bytes]]
"""What clients send in a step to what the server then sends to each that is left, by client."""


@dataclass(frozen=True)
class Masking:
    """What a client masks its update with.

    Attributes:
        half: Its own, after the step "shares". Who masks with it gives it back.
        inbox: What the others have shared with it.
    """

    half: SecureClient
    inbox: bytes


class Halves:
    """The clients' halves of one round.

    Args:
        session: What the server has opened; None: updates travel as they are.
        exchange: Takes a step's messages to the server.

    Attributes:
        maskings: What each client is given to mask its update with.
        down, up: Bytes of the protocol by client, without those of the masked updates.
    """

    def __init__(self, session: Session | None, exchange: Exchange) -> None:
        self._exchange = exchange
        self.down: Counter[int] = Counter()
        self.up: Counter[int] = Counter()
        halves = {c: SecureClient(session, c) for c in session.clients} if session else {}
        self.maskings: dict[int, Masking] = {}
        if halves:
            rosters = self._step({client: half.keys() for client, half in halves.items()})
            inboxes = self._step({c: halves[c].shares(roster) for c, roster in rosters.items()})
            self.maskings = {c: Masking(halves[c], inbox) for c, inbox in inboxes.items()}

    def unmask(self, reports: Iterable[ClientReport]) -> None:
        """Have the survivors unmask the sum.

        Args:
            reports: Those of the round; they bring back the halves.

        Raises:
            MessageError, TooFewClientsError: as `SecureSum.exchange`.
        """
        if self.maskings:
            survivors = self._step({})
            halves = {each.client: each.half for each in reports}
            self._step(
                {c: h.unmask(survivors[c]) for c, h in halves.items() if h and c in survivors}
            )

    def _step(self, sent: Mapping[int, bytes]) -> Mapping[int, bytes]:
        received = self._exchange(sent)
        self.up.update({client: len(message) for client, message in sent.items()})
        self.down.update({client: len(message) for client, message in received.items()})
        return received


def grid_of(experiment: Experiment, examples: Sequence[int]) -> Grid:
    """How values become integers, for all parties and rounds of an experiment.

    Args:
        experiment: What is run.
        examples: (clients,) number of examples of each: the largest is taken to be known to all.

    Raises:
        ConfigError: they do not fit into `secure.bits`.
    """
    config, weighting = experiment.secure, experiment.server.weighting
    largest = max(examples) if weighting == "examples" else 1
    try:
        return Grid(config.clip, largest, experiment.federation.sample_size, config.bits)
    except UserError as error:
        raise ConfigError(
            f"secure.clip = {config.clip:g} with secure.bits = {config.bits}, "
            f"federation.sample_size = {experiment.federation.sample_size} and server.weighting "
            f"'{weighting}': {error}"
        ) from None


def refusals(experiment: Experiment, method: Method) -> dict[str, bool]:
    """Why a sum would not do, or would hide nothing: reasons, and whether each does.

    Where there is differential privacy its own are those of `private.refusals`, which hold before.
    """
    config, federation, down = experiment.secure, experiment.federation, experiment.downlink
    name, sampled = experiment.server.aggregation, experiment.federation.sample_size
    threshold = config.threshold or 0
    most = math.floor(1e4 * (1 - 1 / federation.cohort_size)) / 1e4
    rules = private(experiment)
    reach = rules.reach if rules else 0.0
    able = ", ".join(key for key, known in METHODS.items() if _is_mean(known))
    return {
        f"method '{experiment.method}' has no updates of clients to hide; set secure.threshold to "
        "null": experiment.method != "federated",
        f"server.robust '{experiment.server.robust}' compares single updates, and the server has "
        "their sum alone; allowed: none": experiment.server.robust != "none",
        "lora.client_ranks gives clients updates of different lengths, which have no sum": (
            len({*(experiment.lora.client_ranks or ()), experiment.lora.rank}) > 1
        ),
        f"server.aggregation '{name}' takes more of the updates than their mean; allowed: {able}": (
            not _is_mean(method)
        ),
        "federation.mode 'fedbuff' makes a round of clients that started in different ones, and a "
        "session is of clients that agree on their keys together; allowed: synchronous": (
            federation.mode != "synchronous"
        ),
        f"{sampled} client is sampled, and the sum of one is its update; allowed: 2 and more": (
            sampled < 2
        ),
        f"federation.over_selection = {federation.over_selection:g} samples {sampled} clients, and "
        f"more than half of them are more than the cohort of {federation.cohort_size}, which is "
        f"what the server waits for; allowed: {most:.4g} and less": (
            sampled // 2 >= federation.cohort_size
        ),
        f"it is from {sampled // 2 + 1} to {sampled}, more than half of the {sampled} clients that "
        "are sampled": not sampled < 2 * threshold <= 2 * sampled,
        f"federation.min_updates = {federation.min_updates} would fold fewer updates than can be "
        f"unmasked; allowed: {threshold} and more": federation.min_updates < threshold,
        "uplink.error_feedback adds what the uplink's codes have lost, and there are none": (
            experiment.uplink.error_feedback
        ),
        f"uplink.bits = {experiment.uplink.bits} rounds to codes that have no sum, and integers "
        "of secure.bits travel in their place; allowed: 32": (
            experiment.uplink.bits != FULL_PRECISION
        ),
        "downlink.client_mask has every client return other columns, which have no sum": bool(
            down.client_mask
        ),
        "downlink.rotate 'client' turns each client another way, and the server cannot turn back "
        "a single update; allowed: round, none": down.rotate == "client",
        "dp.clip with secure.bits = 32: a clipped update that is rounded to a coarse grid may be "
        "longer than the clip; allowed: 64": (experiment.dp.clip is not None and config.bits != 64),
        f"dp.noise and dp.adaptive make numbers of up to {reach:.3g} in every update, and "
        f"secure.clip = {config.clip:g} is below": config.clip < reach,
    }


def _is_mean(method: Method) -> bool:
    return method.averages and method.refit is keep
