"""Clients: one host serves many virtual clients on one device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import safetensors.torch
import torch

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.attacked import Attacked, attack
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.emulation import load_client_base, trained_whole
from fedlpp_ray.federation.masks import all_columns, cut
from fedlpp_ray.federation.private import private
from fedlpp_ray.federation.received import Reader
from fedlpp_ray.federation.records import ClientUpdate, Floor, Memory, RoundRecord
from fedlpp_ray.federation.secure import Masking, grid_of
from fedlpp_ray.federation.watch import Watch
from fedlpp_ray.federation.wire import Broadcast, Wire, edition
from fedlpp_ray.lora import ModelState, add_adapter, add_residuals, at_rank, store_in_bf16
from fedlpp_ray.messages import Envelope, MessageError, decode, encode
from fedlpp_ray.models import shard
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.state import VARIATE, State, part, schema_of
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import (
    ALONE,
    ClientRule,
    Descent,
    Group,
    Scaffold,
    Training,
    client_descent,
    client_rules,
    configure_torch,
    dismiss,
    follow,
    together,
    whole_descent,
)

ERROR = "error:"
"""Prefix, in a client's memory, of what rounding took from its updates so far."""


class ClientHost:
    """A client base on one device, lent to one virtual client at a time.

    The base is loaded and quantized once; a client costs writing the broadcast into the adapter
    and a fresh optimizer. A host keeps no state of a client between calls.

    Args:
        experiment: What to run.
        host: Number of this host, reported back with each update.
        emulator: What the server made of its model, if clients have that (`emulator.kind`).
        stream: Where the server makes the base, if clients do not make it from the checkpoint.
        group: Ranks that serve one client together; each has this object, and all but the first
            `follow`.

    Attributes:
        group: The ranks.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        host: int = 0,
        emulator: bytes | None = None,
        stream: BaseStream | None = None,
        group: Group = ALONE,
    ) -> None:
        self._experiment, self.group = experiment, group
        self._host = host
        self._device = configure_torch(experiment.runtime.threads, experiment.runtime.client_gpus)
        self._text = FederatedText(experiment, group)
        base = load_client_base(experiment, self._text, emulator, stream)
        if experiment.client.zero.stage == 3:
            whole = trained_whole(experiment, base, self._text)
            base = shard(base, experiment.client.zero, self._device, whole)
        adapter, lora = experiment.adapter, experiment.lora
        self._model = add_adapter(base, adapter, lora, experiment.seed).to(self._device)
        if (
            find_method(experiment.server.aggregation).writes_base
            and experiment.server.send_residual
        ):
            add_residuals(self._model)
        self._state = ModelState(self._model)
        self._initial = self._state.read()
        if experiment.client.compute == "bf16":
            store_in_bf16(self._model)
        self._wire = Wire(experiment, schema_of(self._initial))
        self._private = private(experiment)
        secure = experiment.secure.threshold is not None
        self._grid = grid_of(experiment, self._text.examples) if secure else None
        self._reader = Reader(experiment, self._wire, self._initial)
        self._watch = Watch(experiment, self._text.examples)
        self._decoded: tuple[Envelope, int, bytes, State] | None = None  # the last message

    @classmethod
    def follow(
        cls,
        experiment: Experiment,
        host: int,
        emulator: bytes | None,
        stream: BaseStream | None,
        group: Group,
    ) -> None:
        """Be another rank than the first, with the same arguments, until that is done."""
        follow(cls(experiment, host, emulator, stream, group))

    def close(self) -> None:
        """Be done: the other ranks end."""
        dismiss(self.group)

    @together
    def train(
        self,
        round: int,
        client: int,
        broadcast: Broadcast,
        memory: Memory = None,
        masking: Masking | None = None,
    ) -> ClientUpdate:
        """Local training of one client from the broadcast.

        Args:
            round: From 1.
            client: Which client.
            broadcast: The one in force; the client reads the message of its edition.
            memory: What this client kept from the last round it took part in.
            masking: With secure aggregation, what the update is masked with; it is used up.

        Raises:
            MessageError: the broadcast is not what this round expects, the training diverged, or
                with secure aggregation a value of the update is beyond `secure.clip`.
            ValueError: there is to be secure aggregation, and nothing to mask with.
        """
        start = time.perf_counter()
        received = self._receive(round, client, broadcast, memory)
        rules = self._rules(received, memory)
        loss = self._train_client(round, client, rules)
        rank = self._experiment.lora.rank_of(client)
        after = self._state.read(rank)
        names = [name for name in self._wire.update(round, rank) if name in after]
        update = cut({name: after[name] - received[name] for name in names}, received)
        errors = _errors(memory)
        update = {n: t + errors[n] if n in errors else t for n, t in update.items()}
        if self._private:
            update = self._private.protect(round, client, update, received)
        envelope = Envelope("update", round, client, self._text.examples[client])
        payload = self._payload(envelope, update, masking)
        kept = {n: t for n, t in after.items() if part(n) in self._wire.method.personal}
        for rule in rules:
            if isinstance(rule, Scaffold):
                kept |= {f"{VARIATE}{name}": c for name, c in rule.variate.items()}
        if self._experiment.uplink.error_feedback:
            sent = decode(payload, envelope, schema_of(update), self._wire.uplink)
            errors |= {name: update[name] - sent[name] for name in update}
            kept |= {f"{ERROR}{name}": tensor for name, tensor in errors.items()}
        return ClientUpdate(
            client,
            payload,
            loss,
            time.perf_counter() - start,
            self._host,
            safetensors.torch.save(kept) if kept else None,
            masking.half if masking else None,
        )

    def _payload(self, envelope: Envelope, update: State, masking: Masking | None) -> bytes:
        """The update as it travels."""
        round, client, config = envelope.round, envelope.client, self._experiment
        assert client is not None
        if (self._grid is None) != (masking is None):
            raise ValueError(
                f"client {client}: secure.threshold and what it has to mask with differ"
            )
        try:
            if self._grid is None:
                random = generator(config.seed, "uplink", round, client)
                return encode(envelope, update, self._wire.uplink, random)
            by_examples = config.server.weighting == "examples"
            vector = self._grid.encode(update, self._text.examples[client] if by_examples else 1)
        except MessageError as error:
            limit = f", secure.clip = {config.secure.clip:g}" if self._grid else ""
            raise MessageError(
                f"round {round}: the training of client {client} diverged "
                f"(client.lr = {config.client.lr:g}{limit}): {error}"
            ) from None
        assert masking is not None
        return masking.half.masked(masking.inbox, vector)

    @together
    def evaluate(
        self,
        round: int,
        broadcast: Broadcast,
        memory: Memory = None,
        newest: Mapping[int, Broadcast] | None = None,
    ) -> tuple[Metrics, Metrics, dict[str, Metrics], float]:
        """Metrics of the broadcast as received, after the strongest client's training, and leaked.

        The last result is the seconds that the leak has cost.

        Args:
            round: In which clients train from the broadcast.
            broadcast: The one in force in that round.
            memory: The strongest client's.
            newest: Broadcasts to attack (`Watch`), by the round in which each was made.
        """
        strongest = self._text.strongest
        received = self._receive(round, strongest, broadcast, memory)
        before = self._text.evaluate(self._model, self._device)
        self._train_client(round, strongest, self._rules(received, memory))
        after = self._text.evaluate(self._model, self._device)
        leak, start = {}, time.perf_counter()
        for name, state in self._watch.states(self._reader, newest or {}):
            self._state.write(state)
            leak[name] = self._text.evaluate(self._model, self._device)
        return before, after, leak, time.perf_counter() - start

    @together
    def measure_floor(self) -> Floor:
        """What the strongest client has without taking part."""
        federation, strongest = self._experiment.federation, self._text.strongest
        self._write(self._initial, strongest)
        base = self._text.evaluate(self._model, self._device)
        steps = federation.rounds * self._text.steps(strongest)  # of LoRA whole, in any method
        self._train(0, strongest, steps, whole_descent(self._experiment))
        local_only = self._text.evaluate(self._model, self._device)
        return Floor(base, local_only, strongest, self._text.examples[strongest])

    def attack(
        self, broadcasts: Mapping[int, Broadcast], history: Sequence[RoundRecord]
    ) -> Attacked:
        """The ladder on the finished run (`adversary.at_end`), by the first rank alone.

        Args:
            broadcasts: All, by the round in which each was made.
            history: The run's rounds.
        """
        return attack(self._experiment, broadcasts, history)

    def _receive(self, round: int, client: int, broadcast: Broadcast, memory: Memory) -> State:
        """Load what a client has: the broadcast, what it kept, and what never travels."""
        key = edition(self._experiment, client)
        state = self._decode(self._wire.envelope(round, key), key, broadcast[key], round)
        own = {n: t for n, t in _load(memory).items() if n in self._initial}
        held = {n: t for n, t in state.items() if n in self._initial}
        self._write(self._initial | held | own, client)
        return state

    def _decode(self, expected: Envelope, edition: int, payload: bytes, round: int) -> State:
        """The state of a broadcast: that of the last one, if this is it again."""
        if self._decoded and self._decoded[:-1] == (expected, edition, payload):
            return self._decoded[-1]
        limit = self._experiment.client.max_broadcast_norm
        try:
            state = self._wire.read(round, edition, payload, limit)
        except MessageError as error:
            raise MessageError(
                f"round {round}, broadcast refused: {error} (client.max_broadcast_norm = {limit:g})"
            ) from None
        self._decoded = expected, edition, payload, state
        return state

    def _write(self, state: State, client: int) -> None:
        """Load a state at the client's rank."""
        rank = self._experiment.lora.rank_of(client)
        self._state.write({n: at_rank(n, tensor, rank) for n, tensor in state.items()})

    def _rules(self, received: State, memory: Memory) -> list[ClientRule]:
        """The corrections of a client's gradient in a round."""
        config = self._experiment.client
        rules = client_rules(config, all_columns(received))
        if config.scaffold:
            c = {name: received[f"{VARIATE}{name}"] for name in self._wire.variates}
            zeros = {name: torch.zeros_like(tensor) for name, tensor in c.items()}
            own = {n.removeprefix(VARIATE): t for n, t in _load(memory).items()}
            rules.append(Scaffold(c, {name: own.get(name, zero) for name, zero in zeros.items()}))
        return rules

    def _train_client(self, round: int, client: int, rules: Sequence[ClientRule]) -> float:
        """A client's training in a round."""
        steps = self._text.steps(client)
        descent = client_descent(self._experiment, round)
        with self._state.training_only(self._wire.method.trained(round)):
            return self._train(round, client, steps, descent, rules)

    def _train(
        self,
        round: int,
        client: int,
        steps: int,
        descent: Descent,
        rules: Sequence[ClientRule] = (),
    ) -> float:
        return Training(
            self._model,
            self._text.client(client),
            self._experiment.client,
            steps=steps,
            seed=derive(self._experiment.seed, "local", round, client),
            pad=self._text.pad,
            device=self._device,
            descent=descent,
            rules=rules,
            group=self.group,
        ).run()


def _load(memory: Memory) -> State:
    return {} if memory is None else safetensors.torch.load(memory)


def _errors(memory: Memory) -> State:
    """What rounding took from this client's earlier updates."""
    return {n.removeprefix(ERROR): t for n, t in _load(memory).items() if n.startswith(ERROR)}
