"""The text of an experiment as its parties use it: tokenized, shared out, batched."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from torch import nn

from fedlpp_ray.config import ClientConfig, Experiment
from fedlpp_ray.federation.sampling import strongest_client
from fedlpp_ray.models import Base, load_tokenizer, share_base
from fedlpp_ray.tasks import Encoded, Prompts, Wording, encode, load_task, share_out
from fedlpp_ray.training import Evaluator, classification_evaluator, generation_evaluator


class FederatedText:
    """The clients' shares and the evaluation on what is held out.

    Args:
        experiment: What to run.

    Attributes:
        classes: Number of classes, or None where a text is to be written.
        partition: Which training examples each client has.
        examples: Number of training examples of each client.
        strongest: The client whose model is measured (`strongest_client`).
        pad: Token id to pad with.
        evaluate: Measures a model on the held-out data.

    Raises:
        AssetError, TaskError: the data or the tokenizer cannot be used.
    """

    def __init__(self, experiment: Experiment) -> None:
        task = load_task(experiment.task)
        tokenizer = load_tokenizer(experiment.model)
        length = experiment.task.max_length
        held_out = task.held_out
        self._own, train, self.partition = share_out(
            task.train, experiment.federation, experiment.seed, experiment.server.examples
        )
        self.examples = array("q", self.partition.sizes.tobytes())
        self.strongest = strongest_client(experiment.lora, self.examples)
        self.pad: int = tokenizer.pad_token_id
        self.classes: int | None
        self.evaluate: Evaluator
        if isinstance(held_out, Prompts):
            wording = Wording(tokenizer, experiment.generation, length)
            self.classes = None
            self._encode: Callable[[Any], Encoded] = wording.encode
            self.evaluate = generation_evaluator(held_out, wording, self.pad, experiment)
        else:
            self.classes = len(task.labels)
            self._encode = lambda examples: encode(examples, tokenizer, length)
            self.evaluate = classification_evaluator(self._encode(held_out), self.pad, experiment)
        self._experiment, self._train = experiment, train
        self._clients: dict[int, Encoded] = {}

    def servers(self) -> Encoded:
        """The server's own examples, which no client has."""
        return self._encode(self._own)

    def steps(self, client: int) -> int:
        """Optimizer steps that a client makes in a round."""
        config = self._experiment
        return config.federation.steps(self.examples[client], config.client.batch_size)

    def pooled(self) -> Encoded:
        """The examples of all clients."""
        return [example for client in range(len(self.partition)) for example in self.client(client)]

    def client(self, client: int) -> Encoded:
        """A client's examples, tokenized when it is first sampled."""
        if client not in self._clients:
            examples = self._train.take(self.partition.indices(client).tolist())
            self._clients[client] = self._encode(examples)
        return self._clients[client]


def load_base(experiment: Experiment, text: FederatedText) -> nn.Module:
    """The model W0 for the kind of task that the text is, without adapters.

    Raises:
        AssetError: as `load_classifier` and `load_generator`.
    """
    return share_base(base_of(experiment, text), ClientConfig())


def base_of(experiment: Experiment, text: FederatedText) -> Base:
    """Which model W0 that is."""
    return Base(experiment.model, text.classes, text.pad, experiment.seed)
