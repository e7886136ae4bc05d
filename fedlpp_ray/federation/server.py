"""The server: it alone holds the global LoRA state in full precision."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from fedlpp_ray.aggregation import apply_rule, weighted_mean, weights
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.records import ClientUpdate
from fedlpp_ray.federation.wire import UPLINK, downlink_codec
from fedlpp_ray.lora import add_lora, read_state, write_state
from fedlpp_ray.messages import Envelope, MessageError, decode, encode
from fedlpp_ray.models import load_classifier
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import State, schema_of, state_digest
from fedlpp_ray.tasks import Metrics
from fedlpp_ray.training import configure_torch, evaluate

ADAPTER_STATE = "adapter_model.safetensors"


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
        text = FederatedText(experiment)
        self._examples, self._held_out = text.examples, text.held_out
        base = load_classifier(experiment.model, text.labels, text.pad, experiment.seed)
        self._model = add_lora(base, experiment.lora, experiment.seed).to(self._device)
        self._state = read_state(self._model)
        self._schema = schema_of(self._state)
        self._codec = downlink_codec(experiment.downlink, self._schema)

    def encode_broadcast(self, round: int) -> bytes:
        """The quantized state D that every client of this round receives."""
        random = generator(self._experiment.seed, "broadcast", round)
        return encode(Envelope("broadcast", round), self._state, self._codec, random)

    def aggregate(self, round: int, broadcast: bytes, updates: Sequence[ClientUpdate]) -> str:
        """Fold the cohort's updates, in the order given, into the next state.

        Returns:
            The digest of the next state.

        Raises:
            MessageError: an update is not what this round expects; the state is unchanged.
        """
        config = self._experiment.server
        down = Envelope("broadcast", round)
        received = decode(broadcast, down, self._schema, self._codec)
        returns = [self._read(round, update) for update in updates]
        examples = [self._examples[update.client] for update in updates]
        mean = weighted_mean(returns, weights(examples, config.weighting))
        self._state = apply_rule(config.rule, self._state, received, mean, config.lr)
        return state_digest(self._state)

    def _read(self, round: int, update: ClientUpdate) -> State:
        examples = self._examples[update.client]
        expected = Envelope("update", round, update.client, examples)
        limit = self._experiment.server.max_update_norm
        try:
            return decode(update.payload, expected, self._schema, UPLINK, max_norm=limit)
        except MessageError as error:
            raise MessageError(
                f"round {round}, update of client {update.client} refused: {error} "
                f"(server.max_update_norm = {limit:g})"
            ) from None

    def evaluate(self) -> Metrics:
        """Metrics of the full-precision base with the full-precision state."""
        write_state(self._model, self._state)
        return evaluate(self._model, self._held_out, self._device)

    def adapter(self) -> dict[str, bytes]:
        """The state as the files of a PEFT adapter, by name."""
        write_state(self._model, self._state)
        with tempfile.TemporaryDirectory() as folder:
            self._model.save_pretrained(folder, save_embedding_layers=False)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def restore(self, adapter: dict[str, bytes]) -> None:
        """Take back the state of an `adapter`.

        Raises:
            ValueError: it is an adapter of another model or rank.
        """
        state = safetensors.torch.load(adapter[ADAPTER_STATE])
        if schema_of(state) != self._schema:
            raise ValueError("the adapter's tensors are not those of this experiment")
        self._state = dict(sorted(state.items()))
