"""Clients: one host serves many virtual clients on one device."""

from __future__ import annotations

import time

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.records import ClientUpdate, Floor
from fedlpp_ray.federation.wire import UPLINK, downlink_codec
from fedlpp_ray.lora import add_lora, read_state, write_state
from fedlpp_ray.messages import Envelope, MessageError, decode, encode
from fedlpp_ray.models import load_classifier, quantize_base
from fedlpp_ray.seeds import derive
from fedlpp_ray.state import State, schema_of
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import configure_torch, evaluate, train_locally


class ClientHost:
    """A client base on one device, lent to one virtual client at a time.

    The base is loaded and quantized once; a client costs writing the broadcast into the adapter
    and a fresh optimizer. A host keeps no state of a client between calls.

    Args:
        experiment: What to run.
        host: Number of this host, reported back with each update.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
    """

    def __init__(self, experiment: Experiment, host: int = 0) -> None:
        self._experiment = experiment
        self._host = host
        self._device = configure_torch(experiment.runtime.threads, experiment.runtime.client_gpus)
        self._text = FederatedText(experiment)
        labels, pad, seed = self._text.labels, self._text.pad, experiment.seed
        # Quantized before it moves: the device never holds the full base, and bitsandbytes
        # quantizes int8 on the way there only.
        base = quantize_base(
            load_classifier(experiment.model, labels, pad, seed), experiment.client
        )
        self._model = add_lora(base, experiment.lora, seed).to(self._device)
        self._initial = read_state(self._model)
        self._schema = schema_of(self._initial)
        self._codec = downlink_codec(experiment.downlink, self._schema)

    def train(self, round: int, client: int, broadcast: bytes) -> ClientUpdate:
        """Local training of one client from the broadcast.

        Raises:
            MessageError: the broadcast is not what this round expects, or the training diverged.
        """
        start = time.perf_counter()
        received = self._receive(round, broadcast)
        loss = self._train_client(round, client, self._experiment.federation.local_steps)
        after = read_state(self._model)
        update = {name: after[name] - received[name] for name in after}
        envelope = Envelope("update", round, client, self._text.examples[client])
        try:
            payload = encode(envelope, update, UPLINK)
        except MessageError as error:
            lr = self._experiment.client.lr
            raise MessageError(
                f"round {round}: the training of client {client} diverged (client.lr = {lr:g}): "
                f"{error}"
            ) from None
        return ClientUpdate(client, payload, loss, time.perf_counter() - start, self._host)

    def evaluate(self, round: int, broadcast: bytes) -> tuple[Metrics, Metrics]:
        """Metrics of the broadcast as received, and after the strongest client's training."""
        self._receive(round, broadcast)
        before = evaluate(self._model, self._text.held_out, self._device)
        self._train_client(round, self._text.strongest, self._experiment.federation.local_steps)
        return before, evaluate(self._model, self._text.held_out, self._device)

    def measure_floor(self) -> Floor:
        """What the strongest client has without taking part."""
        federation, strongest = self._experiment.federation, self._text.strongest
        write_state(self._model, self._initial)
        base = evaluate(self._model, self._text.held_out, self._device)
        self._train_client(0, strongest, federation.rounds * federation.local_steps)
        local_only = evaluate(self._model, self._text.held_out, self._device)
        return Floor(base, local_only, strongest, self._text.examples[strongest])

    def _receive(self, round: int, broadcast: bytes) -> State:
        limit = self._experiment.client.max_broadcast_norm
        expected = Envelope("broadcast", round)
        try:
            state = decode(broadcast, expected, self._schema, self._codec, max_norm=limit)
        except MessageError as error:
            raise MessageError(
                f"round {round}, broadcast refused: {error} (client.max_broadcast_norm = {limit:g})"
            ) from None
        write_state(self._model, state)
        return state

    def _train_client(self, round: int, client: int, steps: int) -> float:
        return train_locally(
            self._model,
            self._text.client(client),
            self._experiment.client,
            steps=steps,
            seed=derive(self._experiment.seed, "local", round, client),
            pad=self._text.pad,
            device=self._device,
        )
