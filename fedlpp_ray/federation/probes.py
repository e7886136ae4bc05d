"""What a server learns of clients' data from the updates of a finished run: every probe of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import load_base
from fedlpp_ray.federation.data_probe import DataProbe, Seen
from fedlpp_ray.federation.emulation import emulate
from fedlpp_ray.federation.inversion_probe import probe_inversion
from fedlpp_ray.federation.recomputed import Recomputed, Sent, check_recomputable
from fedlpp_ray.federation.records import ClientUpdate, RoundRecord
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy import Inversion, MemberScores, Membership, PrivacyError, pool_scores
from fedlpp_ray.seeds import derive


@dataclass(frozen=True)
class Probed:
    """What one update gave away.

    Attributes:
        sent: Which.
        loss: Of the training that made it again, nats.
        same: Whether that is the run's own (`Sent.is_that`).
        scores: Of membership, by name; none where it was refused.
        membership: How well each does.
        inversion: By factor; none where it was refused.
        refused: By probe, the reason.
    """

    sent: Sent
    loss: float
    same: bool
    scores: Mapping[str, MemberScores]
    membership: Mapping[str, Membership]
    inversion: Mapping[str, Inversion]
    refused: Mapping[str, str]


class Probes:
    """The server of a finished run, that looks at its updates.

    Args:
        experiment: What was run.
        broadcasts: All that were sent, by the round in which they were made.
        history: The finished rounds.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
        UserError: as `check_recomputable`.
    """

    def __init__(
        self,
        experiment: Experiment,
        broadcasts: Mapping[int, Broadcast],
        history: Iterable[RoundRecord],
    ) -> None:
        check_recomputable(experiment)
        self._probe = probe = DataProbe(experiment)
        emulator = None
        if experiment.emulator.kind != "none":
            base = load_base(experiment, probe.text)
            emulator = emulate(experiment, probe.text, base, probe.device)
        self._made = Recomputed(experiment, broadcasts, history, emulator)

    def run(self, chosen: Iterable[Sent]) -> Iterator[Probed]:
        """Each update, made again and probed.

        Raises:
            MessageError: as `Recomputed.update`.
            UserError: a broadcast was not kept.
        """
        for sent in chosen:
            update = self._made.update(sent)
            seen = self._probe.decode(
                sent.started, sent.client, self._made.broadcast(sent), update.payload
            )
            yield self._probed(sent, update, seen)

    def _probed(self, sent: Sent, update: ClientUpdate, seen: Seen) -> Probed:
        refused: dict[str, str] = {}
        scores: Mapping[str, MemberScores] = {}
        membership: Mapping[str, Membership] = {}
        inversion: Mapping[str, Inversion] = {}
        try:
            found = self._probe.member_scores(sent.client, seen)
            membership = {name: each.measure() for name, each in found.items()}
            scores = found
        except PrivacyError as error:
            refused["membership"] = str(error)
        try:
            inversion = probe_inversion(self._probe, sent.started, sent.client, seen)
        except PrivacyError as error:
            refused["inversion"] = str(error)
        same = sent.is_that(update)
        return Probed(sent, update.loss, same, scores, membership, inversion, refused)


def pooled(found: Sequence[Probed], seed: int) -> Mapping[str, Membership]:
    """How well each membership score does over several updates, by score.

    Args:
        found: Updates; those without scores are left out.
        seed: Which non-members are taken is drawn from it, for all scores alike.
    """
    parts = [each.scores for each in found if each.scores]
    names = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    return {
        name: pool_scores(
            [part[name] for part in parts], np.random.default_rng(derive(seed, "pooled"))
        ).measure()
        for name in names
    }


def server_view(experiment: Experiment, last: RoundRecord) -> str:
    """Who looks, what they have, and what `dp` does to that: what belongs beside every number.

    Args:
        experiment: What was run.
        last: The last round looked at: what was spent until then.
    """
    who = "server, honest but curious, sees each update by itself"
    has = f"knows W0, D and u as decoded (uplink.bits {experiment.uplink.bits})"
    return f"{who}; {has}; {_in_force(experiment, last)}"


def _in_force(experiment: Experiment, last: RoundRecord) -> str:
    """What differential privacy there is, and against whom."""
    config, spent = experiment.dp, last.privacy
    if config.clip is None or spent is None:
        return "no dp"
    z, adapts = config.noise_multiplier, ", adaptive" if config.adaptive else ""
    clipped = f"u clipped to C = {spent.clip:.3g} (dp.clip{adapts})"
    if not z:
        return f"{clipped}, no noise (dp.noise_multiplier 0)"
    budget = f"epsilon {spent.epsilon:.3g} at delta {spent.delta:.2g} after round {last.round}"
    if config.noise == "server":
        return (
            f"{clipped}; the server adds noise of z = {z:g} after it has seen u: {budget} is "
            "against whoever sees broadcasts, not against it"
        )
    share = z / math.sqrt(experiment.federation.min_updates)
    return (
        f"{clipped}; u has its client's share of the noise, {share:.3g} C; {budget} is of what a "
        "round's shares make together"
    )
