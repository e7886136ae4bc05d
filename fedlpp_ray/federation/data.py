"""The text of an experiment as its parties use it: tokenized, shared out, batched."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlpp_ray.config import ClientConfig, Experiment, GenerationConfig
from fedlpp_ray.federation.sampling import strongest_client
from fedlpp_ray.models import Base, load_tokenizer, model_identity, share_base
from fedlpp_ray.tasks import (
    IGNORED,
    Encoded,
    Prompts,
    TaskError,
    Tokens,
    Wording,
    encode,
    load_auxiliary,
    load_corpus,
    share_out,
)
from fedlpp_ray.tasks.examples import Indices
from fedlpp_ray.training import (
    ALONE,
    Evaluator,
    Group,
    Scorer,
    classification_evaluator,
    classification_scorer,
    generation_evaluator,
    generation_scorer,
    write,
)

Answering = Callable[[Encoded, nn.Module, torch.device], Encoded]
"""Texts without an answer to the same with what a model writes greedily, if there is anything to
write."""


class FederatedText:
    """The clients' shares and the evaluation on what is held out.

    Tokens are mapped from a file that all processes of a node share; nothing is kept of a client.

    Args:
        experiment: What to run.
        group: Ranks that measure together.

    Attributes:
        classes: Number of classes, or None where a text is to be written.
        partition: Which training examples each client has.
        examples: Number of training examples of each client.
        strongest: The client whose model is measured (`strongest_client`).
        pad: Token id to pad with.

    Raises:
        AssetError, TaskError: the data or the tokenizer cannot be used.
    """

    def __init__(self, experiment: Experiment, group: Group = ALONE) -> None:
        self._experiment, self._group = experiment, group
        self._load_tokenizer = partial(load_tokenizer, experiment.model)
        identity = model_identity(experiment.model)
        corpus = load_corpus(experiment.task, experiment.generation, self._load_tokenizer, identity)
        self.classes, self.pad, self._held_out = corpus.classes, corpus.pad, corpus.held_out
        self._own, self._train, self.partition = share_out(
            corpus.train, experiment.federation, experiment.seed, experiment.server.examples
        )
        self.examples = array("q", self.partition.sizes.tobytes())
        self.strongest = strongest_client(experiment.lora, self.examples)

    @cached_property
    def evaluate(self) -> Evaluator:
        """Measures a model on the held-out data; made where it is used, which few parties do."""
        held_out, experiment, group = self._held_out, self._experiment, self._group
        if isinstance(held_out, Prompts):
            return generation_evaluator(held_out, self._wording(), self.pad, experiment, group)
        return classification_evaluator(held_out, self.pad, experiment, group)

    @cached_property
    def score(self) -> Scorer:
        """As `evaluate`, and each held-out example for itself."""
        held_out, experiment, group = self._held_out, self._experiment, self._group
        if isinstance(held_out, Prompts):
            return generation_scorer(held_out, self._wording(), self.pad, experiment, group)
        return classification_scorer(held_out, self.pad, experiment, group)

    def held_out(self) -> tuple[Encoded, Sequence[int] | NDArray[np.int32]]:
        """What models are measured on, prompts with their first reference; and its labels."""
        held_out = self._held_out
        if not isinstance(held_out, Prompts):
            return held_out, held_out.labels
        first = replace(held_out, references=tuple(found[:1] for found in held_out.references))
        return self._wording().encode(first), held_out.labels

    def _wording(self) -> Wording:
        length = self._experiment.task.max_length
        return Wording(self._load_tokenizer(), self._experiment.generation, length)

    def servers(self) -> Tokens:
        """The server's own examples, which no client has."""
        return self._own

    def auxiliary(self, data: str) -> Encoded:
        """Text that is no party's, in random order: with the label 0, or nothing yet to write.

        What is held out is left out.

        Args:
            data: As `adversary.auxiliary`.

        Raises:
            AssetError, TaskError: the data cannot be used, or nothing is left.
        """
        config, held_out = self._experiment.task, self._held_out
        found = load_auxiliary(config, data)
        if isinstance(found, Prompts):
            assert isinstance(held_out, Prompts)
            wording = self._wording()
            asked = [torch.tensor(wording.prompt(text)) for text in found.prompts]
            texts: Encoded = [(x, torch.full_like(x, IGNORED)) for x in asked]
            measured = [torch.tensor(wording.prompt(text)) for text in held_out.prompts]
        else:
            assert not isinstance(held_out, Prompts)
            texts = encode(found, self._load_tokenizer(), config.max_length)
            measured = [ids for ids, _ in held_out]
        known = {tuple(ids.flatten().tolist()) for ids in measured}
        kept = [x for x in texts if tuple(x[0].flatten().tolist()) not in known]
        if not kept:
            raise TaskError(f"adversary.auxiliary: each text of '{data}' is held out")
        return kept

    def answering(self) -> Answering:
        """What answers texts of `auxiliary`; of the data it knows nothing."""
        if self.classes is not None:
            return _as_they_are
        generation = self._experiment.generation.model_copy(update={"beams": 1})
        size = self._experiment.evaluation.batch_size
        return partial(
            _answered,
            wording=self._wording(),
            generation=generation,
            pad=self.pad,
            batch_size=size,
        )

    def steps(self, client: int) -> int:
        """Optimizer steps that a client makes in a round."""
        config = self._experiment
        return config.federation.steps(self.examples[client], config.client.batch_size)

    def pooled(self) -> Tokens:
        """The examples of all clients, client by client."""
        return self._train.take(self.partition.order[: self.partition.offsets[-1]])

    def client(self, client: int) -> Tokens:
        """A client's examples."""
        return self.of_clients(self.partition.indices(client))

    def of_clients(self, indices: Indices) -> Tokens:
        """Clients' examples by their numbers in the partition."""
        return self._train.take(indices)


def _as_they_are(texts: Encoded, _model: nn.Module, _device: torch.device) -> Encoded:
    return texts


def _answered(
    texts: Encoded,
    model: nn.Module,
    device: torch.device,
    *,
    wording: Wording,
    generation: GenerationConfig,
    pad: int,
    batch_size: int,
) -> Encoded:
    written = write(
        model.eval(),
        [ids.tolist() for ids, _ in texts],
        generation,
        pad=pad,
        stop=wording.stop,
        batch_size=batch_size,
        device=device,
    )
    # Where a text was cut, what would come next stands where the end token is.
    ends = [torch.tensor([*tokens, wording.stop[0]]) for tokens in written]
    return [
        (torch.cat([ids, end]), torch.cat([nothing, end]))
        for (ids, nothing), end in zip(texts, ends, strict=True)
        if isinstance(nothing, Tensor)
    ]


def load_base(experiment: Experiment, text: FederatedText) -> nn.Module:
    """The model W0 for the kind of task that the text is, without adapters.

    Raises:
        AssetError: as `load_classifier` and `load_generator`.
    """
    return share_base(base_of(experiment, text), ClientConfig())


def base_of(experiment: Experiment, text: FederatedText) -> Base:
    """Which model W0 that is."""
    return Base(experiment.model, text.classes, text.pad, experiment.seed)
