"""What the server could learn of a client's data from the client's update.

The server is honest but curious: it follows the protocol, and knows the base W0 in full precision,
the broadcast D that a client began from, and the update u that the client returned, decoded, after
all that `uplink` does to it. `privacy/membership.py` and `privacy/inversion.py` have the attacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.masks import fill
from fedlpp_ray.federation.private import private
from fedlpp_ray.federation.wire import Broadcast, Wire, edition
from fedlpp_ray.lora import ModelState, add_adapter, add_residuals, at_rank
from fedlpp_ray.messages import Envelope, decode, encode
from fedlpp_ray.privacy import (
    MemberScores,
    Membership,
    PrivacyError,
    match_labels,
    membership_scores,
)
from fedlpp_ray.privacy.dp import BELOW, CLIP
from fedlpp_ray.privacy.membership import Integers, Sides
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.state import State, part, schema_of
from fedlpp_ray.tasks import Encoded
from fedlpp_ray.training import configure_torch, target_losses


@dataclass(frozen=True)
class Seen:
    """What the server knows of one client's round, in the names and shapes of the wire.

    Attributes:
        broadcast: D, what the client began from, at its rank.
        update: u, what it returned.
        clip: Norm that u was clipped to; infinite without `dp.clip`.
        noise: Standard deviation of what the client then added to each entry (`dp.noise`).
    """

    broadcast: State
    update: State
    clip: float = math.inf
    noise: float = 0.0


class DataProbe:
    """The server's model, whole and in one process, with which updates are attacked.

    Args:
        experiment: What was run.

    Attributes:
        experiment: The same.
        text: Its text.
        device: Where the model is.
        model: The base in full precision with an adapter.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.device = configure_torch(experiment.runtime.threads, experiment.runtime.server_gpus)
        self.text = FederatedText(experiment)
        base = load_base(experiment, self.text)
        adapted = add_adapter(base, experiment.adapter, experiment.lora, experiment.seed)
        self.model = adapted.to(self.device)
        config = experiment.server
        if find_method(config.aggregation).writes_base and config.send_residual:
            add_residuals(self.model)
        self._state = ModelState(self.model)
        self._initial = self._state.read()
        self._wire = Wire(experiment, schema_of(self._initial))
        self._private = private(experiment)

    def decode(self, round: int, client: int, broadcast: Broadcast, payload: bytes) -> Seen:
        """What two messages of a round say to the server, in the client's gauge.

        Args:
            round: In which the client trained, from 1.
            client: Which.
            broadcast: The messages in force in that round.
            payload: The client's update.

        Raises:
            MessageError: a message is not what was to be sent.
        """
        key, rank = edition(self.experiment, client), self.experiment.lora.rank_of(client)
        wire = self._wire
        received = wire.read(round, key, broadcast[key])
        returned = Envelope("update", round, client, self.text.examples[client])
        update = decode(payload, returned, wire.update(round, rank), wire.uplink)
        update = fill(update, received)  # a clip that adapts, and its count, are no parameters
        seen = _without(received, CLIP), _without(update, BELOW)
        if self._private is None:
            return Seen(*seen)
        clip = self._private.clip_of(received)
        return Seen(*seen, clip, self._private.share_std(clip))

    def uplink_error(self) -> float:
        """What the uplink's rounding changes of Gaussian entries, root mean square over theirs."""
        state = {"": torch.randn(64, 256, generator=generator(0, "uplink error"))}
        sent, codec = Envelope("update", 1, 0, 1), self._wire.uplink
        random = generator(0, "uplink error", "rounding")
        found = decode(encode(sent, state, codec, random), sent, schema_of(state), codec)
        return float((found[""] - state[""]).norm() / state[""].norm())

    def membership(
        self, client: int, seen: Seen, *, matched: bool = True
    ) -> Mapping[str, Membership]:
        """How well each of `member_scores` tells the client's training examples from others.

        Raises:
            PrivacyError: no held-out example has a label of the client's, or a model has diverged.
            ValueError: the names of D or u are not the model's.
        """
        scores = self.member_scores(client, seen, matched=matched)
        return {name: each.measure() for name, each in scores.items()}

    def member_scores(
        self, client: int, seen: Seen, *, matched: bool = True
    ) -> Mapping[str, MemberScores]:
        """What D + u says of the client's training examples, and of held-out ones.

        `reference` is to D: what the client's training alone changed. An update of zeros therefore
        ties all of it. `reference_base` is to W0, with all that is trained as the seed draws it:
        what came of the client's earlier rounds counts as well. What never travels (of FFA-LoRA A,
        of FedSA-LoRA B) is as the server has it, from the seed.

        Held-out examples are those of the evaluation, a prompt with its first reference, without
        those that the client has too, token for token. Other clients' examples are neither.

        Args:
            client: Whose.
            seen: As `decode` returns it; any D and u of these names.
            matched: Compare equal shares of each label, or of a generation task's each key
                (`match_labels`); else all with all, and a score that tells labels apart counts as
                one that tells members.

        Returns:
            By name, as `membership_scores`.

        Raises:
            PrivacyError: no held-out example has a label of the client's.
            ValueError: the names of D or u are not the model's.
        """
        ours, theirs, labels = self._compared(client, matched)
        numbers = self.text.partition.indices(client)
        held_out, _ = self.text.held_out()
        sides = self.text.client(client).take(ours), [held_out[i] for i in theirs]
        if unknown := sorted(seen.update.keys() - seen.broadcast.keys()):
            raise ValueError(f"the update has {unknown[0]}, which the broadcast has not")
        attacked = {n: seen.broadcast[n] + u for n, u in seen.update.items()}
        references = {
            "reference": self._losses(client, seen.broadcast, sides),
            "reference_base": self._losses(client, {}, sides),
        }
        losses = self._losses(client, seen.broadcast | attacked, sides)
        return {
            name: MemberScores(members, others, numbers[ours], theirs, labels)
            for name, (members, others) in membership_scores(losses, references).items()
        }

    def load(self, client: int, state: State) -> None:
        """Make the model that of a client: a state at its rank, and the rest from the seed.

        Raises:
            ValueError: the state is not of this model.
        """
        rank, beside = self.experiment.lora.rank_of(client), ("variate", "columns")
        unknown = [n for n in state if n not in self._initial and part(n) not in beside]
        if unknown:
            raise ValueError(f"the model has no {unknown[0]}")
        whole = self._initial | {n: t for n, t in state.items() if n in self._initial}
        self._state.write({n: at_rank(n, tensor, rank) for n, tensor in whole.items()})

    def _losses(self, client: int, state: State, sides: tuple[Encoded, Encoded]) -> Sides:
        self.load(client, state)
        size = self.experiment.evaluation.batch_size
        first, second = (
            target_losses(self.model, x, self.text.pad, self.device, size) for x in sides
        )
        return first, second

    def _compared(self, client: int, matched: bool) -> tuple[Integers, Integers, Integers]:
        """Numbers of members and of non-members, and the labels of these."""
        ours, (found, labels) = self.text.client(client), self.text.held_out()
        known = {_content(ours, i) for i in range(len(ours))}
        other = np.array([i for i in range(len(found)) if _content(found, i) not in known], int)
        members, chosen = np.arange(len(ours)), np.arange(len(other))
        own, theirs = [int(x) for x in ours.labels], np.array([int(labels[i]) for i in other], int)
        if matched:
            random = np.random.default_rng(derive(self.experiment.seed, "membership", client))
            members, chosen = match_labels(own, theirs.tolist(), random)
        if not len(members):
            raise PrivacyError(
                f"membership: no held-out example has a label (or a key) of client {client}'s; "
                "compare it with all of them (matched=False), or hold out more (task.held_out)"
            )
        return members, other[chosen], theirs[chosen]


def _content(examples: Encoded, index: int) -> tuple[object, ...]:
    """By which two examples are one and the same."""
    tokens, label = examples[index]
    own = label if isinstance(label, int) else tuple(label.tolist())
    return tuple(tokens.flatten().tolist()), own


def _without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}
