"""The server: it alone holds the global LoRA state in full precision."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import safetensors.torch
import torch

from fedlpp_ray.aggregation import Return, find_method, fold, make_optimizer, weights
from fedlpp_ray.aggregation.methods import mean_update
from fedlpp_ray.aggregation.products import pad, rotate, truncate
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.adapter import adapter_files, adapter_state
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.emulation import emulate
from fedlpp_ray.federation.masks import fill
from fedlpp_ray.federation.records import ClientUpdate
from fedlpp_ray.federation.wire import Broadcast, Wire, edition
from fedlpp_ray.lora import add_adapter, add_residuals, read_state, write_state
from fedlpp_ray.messages import Envelope, MessageError, decode, encode
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import VARIATE, State, part, schema_of, state_digest
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import (
    client_descent,
    configure_torch,
    next_server_variate,
)

RESIDUAL, OPTIMIZER = "residual.safetensors", "optimizer.safetensors"
VARIATES = "variates.safetensors"
EMULATOR = "emulator.sha256"


class Server:
    """W0 and S in full precision; makes the broadcast, aggregates, evaluates.

    Args:
        experiment: What to run.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._device = configure_torch(experiment.runtime.threads, experiment.runtime.server_gpus)
        self._text = FederatedText(experiment)
        base = load_base(experiment, self._text)
        self._emulator = emulate(experiment, self._text, base, self._device)
        adapter, lora = experiment.adapter, experiment.lora
        self._model = add_adapter(base, adapter, lora, experiment.seed).to(self._device)
        method = find_method(experiment.server.aggregation)
        if method.writes_base:
            add_residuals(self._model)
        self._initial = read_state(self._model)
        self._wire = Wire(experiment, schema_of(self._initial))
        self._state = {name: self._initial[name] for name in sorted(self._wire.kept)}
        self._variates = {n: torch.zeros(shape) for n, shape in self._wire.variates.items()}
        config = experiment.server
        self._optimizer = make_optimizer(
            config.optimizer,
            schema_of(self._state),
            lr=config.lr,
            momentum=config.momentum,
            beta1=config.beta1,
            beta2=config.beta2,
            tau=config.tau,
        )

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""
        return self._text.examples

    def emulator(self) -> bytes | None:
        """What a client has in the place of the model, and downloads once; None: the model."""
        return self._emulator

    def download(self) -> int:
        """Bytes of the emulator; 0 without one."""
        return len(self._emulator or b"")

    def encode_broadcast(self, round: int, clients: Collection[int] = ()) -> Broadcast:
        """The quantized state D, made in this round, in every edition.

        Args:
            round: From 1; one in which `downlink.every` has a broadcast made.
            clients: Who reads it: with `downlink.client_mask`, each has an edition.
        """
        return {key: self._encode(round, key) for key in self._wire.editions(clients)}

    def _encode(self, round: int, edition: int) -> bytes:
        own, rank = edition == self._experiment.lora.rank, self._wire.rank(edition)
        random = generator(self._experiment.seed, "broadcast", round, *(() if own else (edition,)))
        held = self._state | {f"{VARIATE}{name}": c for name, c in self._variates.items()}
        schema = self._wire.broadcast(rank)
        state = truncate({name: t for name, t in held.items() if name in schema}, rank)
        state = self._wire.masks.apply(state, self._wire.masks.draw(round, edition))
        state = self._rotate(round, state)
        return encode(self._wire.envelope(round, edition), state, self._wire.downlink, random)

    def aggregate(self, round: int, broadcast: Broadcast, updates: Sequence[ClientUpdate]) -> str:
        """Fold the cohort's updates, in the order given, into the next state.

        Returns:
            The digest of the next state.

        Raises:
            MessageError: an update is not what this round expects; the state is unchanged.
        """
        config = self._experiment.server
        received = {key: self._received(round, key, payload) for key, payload in broadcast.items()}
        examples = [self._text.examples[update.client] for update in updates]
        shares = weights(examples, config.weighting)
        held = [received[edition(self._experiment, update.client)] for update in updates]
        returns = [
            Return(each, self._read(round, update, each), share)
            for each, update, share in zip(held, updates, shares, strict=True)
        ]
        # Where each client has an edition of its own, the server has none, and its rule needs none.
        masked = self._experiment.downlink.client_mask
        own = self._state if masked else received[self._experiment.lora.rank]
        self._state = fold(
            self._wire.method,
            self._state,
            own,
            returns,
            rule=config.rule,
            lr=config.lr,
            optimizer=self._optimizer,
            random=generator(self._experiment.seed, "aggregate", round),
        )
        if self._variates:
            self._renew_variates(round, updates, mean_update(returns, {}), own)
        return state_digest(self._state)

    def _renew_variates(
        self, round: int, updates: Sequence[ClientUpdate], mean: State, received: State
    ) -> None:
        """SCAFFOLD's c, from K - D and what clients received of c."""
        experiment = self._experiment
        counts = self._text.examples
        by_examples = experiment.server.weighting == "examples"
        cohort = [counts[u.client] if by_examples else 1 for u in updates]
        share = sum(cohort) / (sum(counts) if by_examples else len(counts))
        descent = client_descent(experiment, round)
        self._variates = next_server_variate(
            self._variates,
            {name: received[f"{VARIATE}{name}"] for name in self._variates},
            mean,
            share=share,
            travelled=descent.travelled(experiment.client.lr, self._text.steps(updates[0].client)),
        )

    def _received(self, round: int, edition: int, payload: bytes) -> State:
        """What readers of an edition have decoded, at the server's rank; what never travels, as is.

        A residual that is not sent is what the server has: no client can have changed it.
        """
        schema = self._wire.broadcast(self._wire.rank(edition))
        expected = self._wire.envelope(round, edition)
        state = decode(payload, expected, schema, self._wire.downlink)
        state = self._rotate(round, fill(state, state), back=True)
        return self._initial | self._state | pad(state, self._experiment.lora.rank)

    def _read(self, round: int, update: ClientUpdate, received: State) -> State:
        rank = self._experiment.lora.rank_of(update.client)
        expected = Envelope("update", round, update.client, self._text.examples[update.client])
        schema, limit = self._wire.update(round, rank), self._experiment.server.max_update_norm
        try:
            state = decode(update.payload, expected, schema, self._wire.uplink, max_norm=limit)
            state = self._wire.masks.settle(state, received)
        except MessageError as error:
            raise MessageError(
                f"round {round}, update of client {update.client} refused: {error} "
                f"(server.max_update_norm = {limit:g})"
            ) from None
        return pad(self._rotate(round, state, back=True), self._experiment.lora.rank)

    def _rotate(self, round: int, state: State, *, back: bool = False) -> State:
        """A state in the gauge of the broadcast in force, or an update back in the server's."""
        down = self._experiment.downlink
        if not down.rotate:
            return state
        random = generator(self._experiment.seed, "rotation", down.made_in(round))
        return rotate(state, random, back=back)

    def evaluate(self) -> Metrics | None:
        """Metrics of the full-precision base with the full-precision state.

        None where `evaluation.server` is false.
        """
        if not self._experiment.evaluation.server:
            return None
        write_state(self._model, self._initial | self._state)
        return self._text.evaluate(self._model, self._device)

    def adapter(self) -> dict[str, bytes]:
        """The state as files by name: a PEFT adapter, and what an adapter cannot hold.

        `residual.safetensors` has what is added to the base, times alpha / rank;
        `optimizer.safetensors` what the server's optimiser remembers; `variates.safetensors`
        SCAFFOLD's c; `emulator.sha256` which emulator clients have. Each only where there is any.
        """
        write_state(self._model, self._initial | self._state)
        files = adapter_files(self._model)
        residuals = {n: t for n, t in self._state.items() if part(n) == "residual"}
        beside = {
            RESIDUAL: residuals,
            OPTIMIZER: self._optimizer.state_dict(),
            VARIATES: self._variates,
        }
        for name, tensors in beside.items():
            if tensors:
                files[name] = safetensors.torch.save(tensors)
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
        return state_digest(self._state)
