"""The server: it alone holds the global LoRA state in full precision."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

import safetensors.torch
import torch
from torch import Tensor

from fedlpp_ray.aggregation import RoundSum, make_optimizer
from fedlpp_ray.aggregation.products import truncate
from fedlpp_ray.aggregation.rules import next_state
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.adapter import adapter_state
from fedlpp_ray.federation.aggregator import Aggregator
from fedlpp_ray.federation.average import Average
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.last_sent import LastSent
from fedlpp_ray.federation.opening import Opening
from fedlpp_ray.federation.perturbation import Perturbation
from fedlpp_ray.federation.private import UNCLIPPED, Clipping, private
from fedlpp_ray.federation.records import Assignment, Final
from fedlpp_ray.federation.secure import grid_of
from fedlpp_ray.federation.secure_sum import SecureSum, SecureTotal
from fedlpp_ray.federation.server_model import ServerModel
from fedlpp_ray.federation.wire import Broadcast, Wire
from fedlpp_ray.messages import KEY_BYTES, MessageError, encode
from fedlpp_ray.privacy.dp import CLIP
from fedlpp_ray.privacy.secure import Session, length_of
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import VARIATE, State, part, schema_of, state_digest
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import (
    ALONE,
    Group,
    client_descent,
    dismiss,
    follow,
    next_server_variate,
)

RESIDUAL, OPTIMIZER = "residual.safetensors", "optimizer.safetensors"
VARIATES, CLIPPING = "variates.safetensors", "clip.safetensors"
AVERAGE, CORRECTION = "average.safetensors", "correction.safetensors"
EMULATOR = "emulator.sha256"


class Server:
    """W0 and S in full precision; makes the broadcast, aggregates, evaluates.

    Args:
        experiment: What to run.
        group: Ranks that have the model together; this is rank 0, and the others `follow`.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment, group: Group = ALONE) -> None:
        self._experiment = experiment
        self._text = FederatedText(experiment, group)
        self._model = ServerModel(experiment, self._text, group)
        self._initial, self._emulator = self._model.initial, self._model.emulator
        self._wire = Wire(experiment, schema_of(self._initial))
        self._state = {name: self._initial[name] for name in sorted(self._wire.kept)}
        self._variates = {n: torch.zeros(shape) for n, shape in self._wire.variates.items()}
        self._aggregator: Aggregator | SecureSum | None = None
        self._secure: SecureSum | None = None
        self._last_sent = LastSent(self._wire)
        self._private = private(experiment)
        self._clip = self._private.first_clip if self._private else math.inf
        self._clipping = UNCLIPPED
        config, self._closed = experiment.server, 0
        self._average = Average(config.final_average, experiment.federation.rounds)
        self._optimizer = make_optimizer(
            config.optimizer,
            schema_of(self._state),
            lr=config.lr,
            momentum=config.momentum,
            beta1=config.beta1,
            beta2=config.beta2,
            tau=config.tau,
        )

    @staticmethod
    def follow(experiment: Experiment, group: Group) -> None:
        """Be another rank than 0, until that is done."""
        follow(ServerModel(experiment, FederatedText(experiment, group), group))

    def close(self) -> None:
        """Be done: the other ranks end."""
        dismiss(self._model.group)

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""
        return self._text.examples

    def emulator(self) -> bytes | None:
        """What a client has in the place of the model, and downloads once; None: the model."""
        return self._emulator

    def download(self) -> int:
        """Bytes that a client receives once: of the emulator and the dither's key, if any."""
        return len(self._emulator or b"") + KEY_BYTES * self._wire.downlink.guard.subtracted

    def base_identity(self) -> tuple[Mapping[str, object], int] | None:
        """What tells the base that clients receive from all others, and the number of its parts.

        None where clients make their base themselves, from the checkpoint.
        """
        parts = self._model.parts
        return None if parts is None else (parts.identity, len(parts))

    def base_part(self, number: int) -> bytes:
        """One part of the base that clients receive, quantized (safetensors)."""
        return self._model.part(number)

    def encode_broadcast(
        self, round: int, clients: Collection[int] = (), beside: Collection[int] = ()
    ) -> Broadcast:
        """The quantized state D, made in this round, in every edition.

        Where each client has a message of its own, these are the clients'.

        Args:
            round: From 1; one in which `downlink.every` has a broadcast made.
            clients: Who trains from it.
            beside: Who only reads it, to be measured: none of the others.
        """
        experiment, weights = self._experiment, {each: self._weight(each) for each in clients}
        size = experiment.downlink.perturbation
        perturbation = Perturbation(size, experiment.seed, round, self._state, weights)
        return {
            key: self._encode(round, key, perturbation.of(key))
            for key in self._wire.editions(sorted({*clients, *beside}))
        }

    def _encode(self, round: int, edition: int, state: State) -> bytes:
        rank, random = self._wire.rank(edition), self._wire.draws(round, edition)
        held = state | {f"{VARIATE}{name}": c for name, c in self._variates.items()}
        held[CLIP] = torch.tensor([self._clip])
        schema = self._wire.broadcast(rank)
        state = truncate({name: t for name, t in held.items() if name in schema}, rank)
        state = self._wire.masks.apply(state, self._wire.masks.draw(round, edition))
        state = self._wire.rotate(round, edition, state)
        envelope, before = self._wire.envelope(round, edition), self._last_sent.before(edition)
        payload = encode(envelope, state, self._wire.downlink, random, before)
        self._last_sent.add(edition, payload)
        return payload

    def _weight(self, client: int) -> int:
        """Of a client in the mean."""
        by_examples = self._experiment.server.weighting == "examples"
        return self._text.examples[client] if by_examples else 1

    def opening(
        self, round: int, cohort: Sequence[Assignment], broadcasts: Mapping[int, Broadcast]
    ) -> Opening:
        """What an `Aggregator` of a round needs to know, here or on another machine.

        Args:
            round: The server's, from 1.
            cohort: The clients that may return, each once.
            broadcasts: The broadcasts that they train from, by the round in which each was made.

        Raises:
            ValueError: the cohort has a client twice, one that there is none of, or one that
                trains from a broadcast that is not given; or its discounts are out of range.
        """
        counts = self._text.examples
        if unknown := [each.client for each in cohort if each.client not in range(len(counts))]:
            raise ValueError(f"client {unknown[0]} is not one of {len(counts)}")
        unsent = {n: t for n, t in self._initial.items() if n not in self._state}
        return Opening(
            experiment=self._experiment,
            schema=schema_of(self._initial),
            round=round,
            cohort=tuple(cohort),
            broadcasts=broadcasts,
            examples={each.client: counts[each.client] for each in cohort},
            unsent={n: t for n, t in unsent.items() if part(n) != "residual"},
            clip=self._clip,
        )

    def open_session(self, round: int, clients: Sequence[int]) -> Session | None:
        """Begin secure aggregation with all who are sampled for a round; None without it.

        Args:
            round: From 1.
            clients: Who is sampled, ascending.

        Raises:
            UserError: the library is missing, or the threshold is out of the range of so many.
        """
        config, rank = self._experiment.secure, self._experiment.lora.rank
        if config.threshold is None:
            return None
        length = length_of(self._wire.update(round, rank))
        session = Session(round, tuple(clients), config.threshold, length, config.bits)
        grid = grid_of(self._experiment, self._text.examples)
        self._secure = SecureSum(self._experiment, session, grid)
        return session

    def exchange(self, round: int, sent: Mapping[int, bytes]) -> dict[int, bytes]:
        """End a step of secure aggregation (`SecureSum.exchange`).

        Raises:
            MessageError: the round has no session; or as there.
            TooFewClientsError: as there.
        """
        return self._in_session(round).exchange(sent)

    def open_round(
        self, round: int, cohort: Sequence[Assignment], broadcasts: Mapping[int, Broadcast]
    ) -> None:
        """Begin to receive updates. What a round that was not closed has received is forgotten.

        The arguments are those of `opening`.

        Raises:
            MessageError: a broadcast is not what its round made, or with secure aggregation the
                round has no session.
            ValueError: as `opening`.
        """
        opening = self.opening(round, cohort, broadcasts)
        if self._experiment.secure.threshold is None:
            self._aggregator = Aggregator(opening)
        else:
            self._aggregator = self._in_session(round)
            self._aggregator.open(opening)

    def receive(self, round: int, client: int, payload: bytes) -> None:
        """Add a client's update to the round, in whatever order updates arrive.

        Raises:
            MessageError: the round is not open, the client is not in its cohort or has returned, or
                the update is not what the client was to send. Nothing has changed.
        """
        self._open(round).receive(client, payload)

    def verdict(self, round: int, client: int, payload: bytes) -> str | None:
        """As `receive`; why the update is refused, or None."""
        return self._open(round).verdict(client, payload)

    def merge(self, round: int, partial: bytes) -> list[int]:
        """Add what an `Aggregator` elsewhere has received.

        Returns:
            Its clients, sorted.

        Raises:
            MessageError: the round is not open, the partial result is of another one, or holds a
                client that is not in the cohort or has returned. Nothing has changed.
        """
        return self._open(round).merge(partial)

    def returned(self, round: int) -> list[int]:
        """Clients whose updates it holds, sorted.

        Raises:
            MessageError: the round is not open.
        """
        return self._open(round).clients

    def aggregate(self, round: int) -> str:
        """Close the round: fold what has been received into the next state.

        Returns:
            The digest of the next state; where nothing has been received, of the same one.

        Raises:
            MessageError: the round is not open.
        """
        aggregator = self._open(round)
        total = aggregator.total
        # Where each client has an edition of its own there is no other, and the rule needs none.
        own = self._state if self._experiment.downlink.individual else aggregator.own
        if total.clients and self._private:
            self._state = self._next_private(round, total, own)
        elif total.clients:
            self._state = total.next_state(
                self._state,
                own,
                self._optimizer,
                generator(self._experiment.seed, "aggregate", round),
            )
        if total.clients and self._variates:
            self._renew_variates(round, total.clients, total.direction(), own)
        if total.clients and self._experiment.server.tune_steps:
            tuned = self._model.tune(round, self._initial | self._state)
            self._state = {name: tuned[name] for name in self._state}
        return self._close(round)

    def _close(self, round: int) -> str:
        """Forget what was received; returns the digest of the state, which is that of the round."""
        self._aggregator = self._secure = None
        self._closed = round
        self._average.add(round, self._state)
        self._last_sent.close()
        return state_digest(self._state)

    def _next_private(self, round: int, total: RoundSum | SecureTotal, own: State) -> State:
        """The next state from a mean with noise, and with it the next clip."""
        assert self._private is not None
        mean, self._clipping, self._clip = self._private.settle(
            round, total.direction(), total.clients, self._clip
        )
        return next_state(self._experiment.server.rule, self._state, own, mean, self._optimizer)

    def clipping(self) -> Clipping:
        """C in the round last closed, and the noised fraction of its clients within C, if any."""
        return self._clipping

    def discard(self, round: int) -> str:
        """Close the round without a change; returns the digest of the state.

        Raises:
            MessageError: the round is not open.
        """
        self._open(round)
        self._clipping = (self._clip, None)
        return self._close(round)

    def _open(self, round: int) -> Aggregator | SecureSum:
        if self._aggregator is None or self._aggregator.round != round:
            raise MessageError(f"round {round} is not open")
        return self._aggregator

    def _in_session(self, round: int) -> SecureSum:
        if self._secure is None or self._secure.round != round:
            raise MessageError(f"round {round} has no session of secure aggregation")
        return self._secure

    def _renew_variates(
        self, round: int, clients: Collection[int], mean: Mapping[str, Tensor], received: State
    ) -> None:
        """SCAFFOLD's c, from K - D and what the clients whose updates were accepted had of c."""
        experiment = self._experiment
        counts = self._text.examples
        by_examples = experiment.server.weighting == "examples"
        accepted = sum(counts[client] for client in clients) if by_examples else len(clients)
        population = sum(counts) if by_examples else len(counts)
        descent = client_descent(experiment, round)
        steps = self._text.steps(min(clients))  # the same for all
        self._variates = next_server_variate(
            self._variates,
            {name: received[f"{VARIATE}{name}"] for name in self._variates},
            mean,
            share=accepted / population,
            travelled=descent.travelled(experiment.client.lr, steps),
        )

    def evaluate(self) -> Metrics | None:
        """Metrics of the full-precision base with the full-precision state.

        None where `evaluation.server` is false.
        """
        if not self._experiment.evaluation.server:
            return None
        return self._model.evaluate(self._initial | self._state)

    def finish(self) -> Final | None:
        """The final model: the mean of the last states, then tuned, as `server.final_*` say.

        After the last round was closed. The state stays as it is, and nothing is sent of it.

        Returns:
            None where there is to be none.
        """
        config = self._experiment.server
        if not config.makes_final:
            return None
        whole = self._initial | (self._average.mean() or self._state)
        if config.final_tune_steps:
            whole = self._model.finish(whole)
        state = {name: whole[name] for name in self._state}
        measured = self._experiment.evaluation.server
        metrics = self._model.evaluate(self._initial | state) if measured else None
        return Final(metrics, state_digest(state), self._files(state, corrected=True))

    def _files(self, state: State, *, corrected: bool) -> dict[str, bytes]:
        """A PEFT adapter, and what an adapter cannot hold of the model."""
        beside = {RESIDUAL: {n: t for n, t in state.items() if part(n) == "residual"}}
        if corrected:
            beside[CORRECTION] = self._model.correction()
        return self._model.files.of(self._initial | state) | _saved(beside)

    def adapter(self) -> dict[str, bytes]:
        """The state as files by name: a PEFT adapter, and what an adapter cannot hold.

        `residual.safetensors` has what is added to the base, times alpha / rank;
        `correction.safetensors`, after the last round where no final model comes, R of
        `server.base_correction` (`Correction.tensors`); `optimizer.safetensors` what the server's
        optimiser remembers; `average.safetensors` the sum of the last states;
        `variates.safetensors` SCAFFOLD's c; `clip.safetensors` the clip that adapts;
        `emulator.sha256` which emulator clients have; `sent-EDITION.safetensors` the last
        broadcasts. Each only where there is any.
        """
        experiment = self._experiment
        ends = self._closed == experiment.federation.rounds and not experiment.server.makes_final
        files = self._files(self._state, corrected=ends) | self._last_sent.files()
        beside = {
            OPTIMIZER: self._optimizer.state_dict(),
            VARIATES: self._variates,
        }
        if self._experiment.dp.adaptive:
            beside[CLIPPING] = {CLIP: torch.tensor([self._clip])}
        files |= _saved(beside)
        if average := self._average.save():
            files[AVERAGE] = average
        if self._emulator is not None:
            files[EMULATOR] = self._emulator_digest()
        return files

    def _emulator_digest(self) -> bytes:
        return hashlib.sha256(self._emulator or b"").hexdigest().encode()

    def restore(self, adapter: dict[str, bytes]) -> str:
        """Take back the state of an `adapter`.

        Returns:
            Its digest.

        Raises:
            ValueError: it is an adapter of another model, rank or method.
        """
        own = {n: t for n, t in self._initial.items() if part(n) != "residual"}
        if adapter.get(EMULATOR, self._emulator_digest()) != self._emulator_digest():
            raise ValueError(
                "the emulator made here is not that which clients have downloaded: go on where the "
                "run began (the same kind of machine, runtime.threads and packages)"
            )
        state = adapter_state(adapter, own)
        if RESIDUAL in adapter:
            state |= safetensors.torch.load(adapter[RESIDUAL])
        self._state = {name: state[name] for name in sorted(self._wire.kept)}
        if OPTIMIZER in adapter:
            self._optimizer.load_state_dict(safetensors.torch.load(adapter[OPTIMIZER]))
        if VARIATES in adapter:
            self._variates = safetensors.torch.load(adapter[VARIATES])
        self._average.load(adapter.get(AVERAGE))
        self._last_sent.restore(adapter)
        if CLIPPING in adapter:
            self._clip = float(safetensors.torch.load(adapter[CLIPPING])[CLIP])
        return state_digest(self._state)


def _saved(beside: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bytes]:
    """Files by name, each only where there is a tensor."""
    return {
        name: safetensors.torch.save(dict(tensors)) for name, tensors in beside.items() if tensors
    }
