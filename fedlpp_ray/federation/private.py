"""Client-level differential privacy: what clients and server do to updates, and what it costs.

The update u_i = a_i - D of a client is clipped to norm C. Of a round the server learns

    (sum_i clip(u_i) + N(0, (z C)^2)) / n,  n = the planned size of the cohort

and makes all else from it: the rule, the optimiser and later broadcasts change nothing in the
guarantee. A client that does not return counts as u_i = 0, so that one client changes the sum by a
known length whoever else returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from fedlpp_ray.aggregation import METHODS, Method
from fedlpp_ray.aggregation.methods.base import keep
from fedlpp_ray.config import FULL_PRECISION, Experiment
from fedlpp_ray.federation.records import Spent
from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy.dp import (
    BELOW,
    CLIP,
    NoisedMean,
    clipped,
    draw_for,
    epsilon_of,
    next_clip,
    norm,
    update_multiplier,
    with_noise,
)
from fedlpp_ray.state import Schema, State, schema_of

Clipping = tuple[float, float | None]
"""C in force in a round, and the noised fraction of its clients within C where that is counted."""
UNCLIPPED: Clipping = (math.inf, None)

_SIGMAS = 8
"""A Gaussian vector's norm is above sigma (sqrt(d) + 8) with a chance below 1e-13."""
_TOLERANCE = 1e-6
"""Relative, on the norm of an update that was clipped and travelled in fp32."""


class Private:
    """The rules of an experiment with `dp.clip`; it holds nothing that changes.

    Args:
        experiment: What is run.

    Attributes:
        adaptive: Whether C changes from round to round, and so travels with the broadcast.
        first_clip: C in round 1.
    """

    def __init__(self, experiment: Experiment) -> None:
        config, federation = experiment.dp, experiment.federation
        assert config.clip is not None
        self._config, self._seed = config, experiment.seed
        self._cohort, self.adaptive = federation.cohort_size, config.adaptive
        self.first_clip = _in_fp32(config.clip) if self.adaptive else config.clip
        self._multiplier, self._count = config.noise_multiplier, 0.0
        if self.adaptive:
            self._count = count_noise(experiment)
            self._multiplier = update_multiplier(config.noise_multiplier, self._count)
        self._shares = federation.min_updates if config.noise == "clients" else None

    @property
    def reach(self) -> float:
        """Absolute value that a client's noise, and its count, stay within at the first clip."""
        noise = _SIGMAS * self._share("", self.first_clip)
        return max(noise, self._most_counted(0.0)) if self.adaptive else noise

    def clip_of(self, broadcast: State) -> float:
        """C in force with a broadcast, as decoded."""
        return float(broadcast[CLIP]) if self.adaptive else self.first_clip

    def share_std(self, clip: float) -> float:
        """Standard deviation of a client's own noise on an update; 0 where the server adds it."""
        return self._share("", clip)

    def protect(self, round: int, client: int, update: State, broadcast: State) -> State:
        """What a client sends for its update: it clipped, and with its share of the noise.

        The same update of a round is the same bits again; another one has a share of its own.

        Args:
            round: From 1.
            client: Which.
            update: u_i = a_i - D.
            broadcast: As decoded; it has C where the clip adapts.
        """
        clip = self.clip_of(broadcast)
        answer = clipped(update, clip)
        if self.adaptive:
            answer = answer | {BELOW: torch.tensor([0.5 if norm(update) <= clip else -0.5])}
        stds = {name: self._share(name, clip) for name in answer}
        draw = draw_for(answer, stds, self._seed, "dp share", round, client)
        return with_noise(answer, stds, draw)

    def admit(self, answer: State, clip: float, *, exact: bool) -> None:
        """Refuse what no client sends that has clipped its update.

        Args:
            answer: As decoded.
            clip: C in force.
            exact: Whether it travelled in fp32: other rounding may enlarge a norm.

        Raises:
            MessageError: the norm is above C, or above what the noise can make of it.
        """
        update = {name: tensor for name, tensor in answer.items() if name != BELOW}
        limit = clip * (1 + _TOLERANCE) + self._noise_norm(schema_of(update), clip)
        if exact and norm(update) > limit:
            raise MessageError(
                f"its norm is {norm(update):.4g}; clipped to dp.clip = {clip:.4g} "
                f"it is at most {limit:.4g}"
            )
        most = self._most_counted(clip)
        if self.adaptive and abs(float(answer[BELOW])) > most:
            raise MessageError(f"{BELOW} is {float(answer[BELOW]):.4g}; at most {most:.4g}")

    def slack(self, schema: Schema, clip: float) -> float:
        """What a client's noise and its count add to the norm of what it sends, at most.

        Args:
            schema: Of what it sends.
            clip: C in force.
        """
        counted = self._most_counted(clip) if self.adaptive else 0.0
        return self._noise_norm(schema, clip) + counted

    def bounded(self, answer: State, clip: float) -> State:
        """An update as the server adds it: clipped by the server itself, whoever sent it.

        Not where clients have added noise: it takes the norm beyond C.
        """
        if self._shares is not None:
            return answer
        update = {name: tensor for name, tensor in answer.items() if name != BELOW}
        return answer | clipped(update, clip)

    def settle(
        self, round: int, mean: Mapping[str, Tensor], returned: Collection[int], clip: float
    ) -> tuple[Mapping[str, Tensor], Clipping, float]:
        """What the server makes of a round's mean, and all that it may look at.

        The same mean of the same clients gives the same bits again; any other, also of this round
        in another run of the seed, has noise of its own.

        Args:
            round: From 1.
            mean: Over those that returned, of what they sent; float64.
            returned: Whose.
            clip: C in force.

        Returns:
            K - D with noise, over the planned cohort; C and how many were within it; the next C.
        """
        share = len(returned) / self._cohort
        stds = {name: self._noise(name, clip) / self._cohort for name in mean}
        whose = "+".join(map(str, sorted(returned)))
        draw = draw_for(mean, stds, self._seed, "dp noise", round, self._cohort, whose)
        if not self.adaptive:
            return NoisedMean(mean, share, stds, draw), (clip, None), clip
        counted = {BELOW: stds.pop(BELOW)}
        below = 0.5 + float(NoisedMean(mean, share, counted, draw)[BELOW])
        following = next_clip(clip, below, self._config.quantile, self._config.adaptive_lr)
        return NoisedMean(mean, share, stds, draw), (clip, below), following

    def _std(self, name: str, clip: float) -> float:
        """Of the noise on a sum over the cohort."""
        return self._count if name == BELOW else self._multiplier * clip

    def _share(self, name: str, clip: float) -> float:
        """Of a client's part of that noise: as many as make a round have enough of it."""
        return 0.0 if self._shares is None else self._std(name, clip) / math.sqrt(self._shares)

    def _noise_norm(self, schema: Schema, clip: float) -> float:
        """Of a client's part on an update, at most."""
        numbers = sum(math.prod(shape) for name, shape in schema.items() if name != BELOW)
        return self._share("", clip) * (math.sqrt(numbers) + _SIGMAS)

    def _most_counted(self, clip: float) -> float:
        """Absolute value of a client's count, with its part of the noise, at most."""
        return 0.5 + _SIGMAS * self._share(BELOW, clip)

    def _noise(self, name: str, clip: float) -> float:
        """Of the server's part."""
        return self._std(name, clip) if self._shares is None else 0.0


def private(experiment: Experiment) -> Private | None:
    """The rules of an experiment; None without differential privacy."""
    return None if experiment.dp.clip is None else Private(experiment)


def count_noise(experiment: Experiment) -> float:
    """`dp.count_noise`, or a twentieth of the cohort (Andrew et al.)."""
    given = experiment.dp.count_noise
    return experiment.federation.cohort_size / 20 if given is None else given


def delta(experiment: Experiment) -> float:
    """`dp.delta`, or 1 / clients^1.1 (McMahan et al.)."""
    given = experiment.dp.delta
    return experiment.federation.clients**-1.1 if given is None else given


def spent(experiment: Experiment, round: int, clipping: Callable[[], Clipping]) -> Spent | None:
    """The ledger after a round; None without differential privacy.

    A round that was abandoned counts as any other. Over-selected clients are sampled as the others
    are, so all of them are the sample.

    Args:
        experiment: What is run.
        round: The last one, from 1.
        clipping: Asks the server for that of this round, where the clip adapts.
    """
    config, federation = experiment.dp, experiment.federation
    if config.clip is None:
        return None
    clip, below = clipping() if config.adaptive else (config.clip, None)
    epsilon = epsilon_of(
        round,
        clients=federation.clients,
        sampled=federation.sample_size,
        noise_multiplier=config.noise_multiplier,
        delta=delta(experiment),
    )
    return Spent(epsilon, delta(experiment), clip, below)


def refusals(experiment: Experiment, method: Method) -> dict[str, bool]:
    """Why the guarantee of `dp.clip` would not hold: reasons, and whether each does."""
    config, federation, name = experiment.dp, experiment.federation, experiment.server.aggregation
    able = ", ".join(key for key, known in METHODS.items() if _is_mean(known))
    least = config.noise_multiplier / 2
    return {
        f"method '{experiment.method}' has no updates of clients to clip; set dp.clip to null": (
            experiment.method != "federated"
        ),
        "server.weighting 'examples' multiplies a clipped update by a number that the clip does "
        "not bound; allowed: uniform": experiment.server.weighting != "uniform",
        f"server.aggregation '{name}' is no plain mean of updates of all that is trained; allowed: "
        f"{able}": not _is_mean(method),
        f"server.robust '{experiment.server.robust}' is no sum of updates, which the clip and the "
        "noise are made for; allowed: none": experiment.server.robust != "none",
        "client.scaffold makes a second mean, of variates, which is not clipped": (
            experiment.client.scaffold
        ),
        "uplink.error_feedback adds to an update what rounding took from earlier ones, beyond what "
        "the clip bounds in a round": experiment.uplink.error_feedback,
        "federation.mode 'fedbuff' discounts late updates, and whose come into a buffer is no "
        "uniform sample; allowed: synchronous": federation.mode != "synchronous",
        f"federation.sampling '{federation.sampling}' is by the clients' data, and epsilon is "
        "accounted for a uniform sample; allowed: uniform": federation.sampling != "uniform",
        f"federation.max_participations = {federation.max_participations} leaves out who was "
        "sampled often, and epsilon is accounted for a uniform sample in every round; allowed: "
        "null": federation.max_participations is not None,
        "federation.local_epochs lets the clients' numbers of examples decide who is in time for "
        "federation.over_selection and federation.deadline; set federation.local_steps": (
            federation.local_epochs is not None
            and bool(federation.over_selection or federation.deadline)
        ),
        "downlink.server_mask and downlink.client_mask leave columns that no client trains, which "
        "noise would move": bool(
            experiment.downlink.server_mask or experiment.downlink.client_mask
        ),
        f"dp.noise 'clients' with uplink.bits = {experiment.uplink.bits}: rounding each share of "
        "the noise leaves a sum that is not Gaussian; allowed: 32": (
            config.noise == "clients" and experiment.uplink.bits != FULL_PRECISION
        ),
        "dp.adaptive sends the clip with every broadcast, and downlink.every = "
        f"{experiment.downlink.every} leaves an earlier one in force; allowed: 1": (
            config.adaptive and experiment.downlink.every > 1
        ),
        f"dp.count_noise = {count_noise(experiment):g} takes all of the budget of "
        f"dp.noise_multiplier = {config.noise_multiplier:g}; allowed: above {least:g}": (
            config.adaptive and config.noise_multiplier > 0 and count_noise(experiment) <= least
        ),
        "dp.delta is 1 with one client: set it": delta(experiment) >= 1,
    }


def _is_mean(method: Method) -> bool:
    return method.averages and method.refit is keep and not method.personal


def _in_fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
