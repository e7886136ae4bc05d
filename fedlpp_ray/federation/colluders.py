"""What colluding clients can compute: `privacy.view.Tools` on their models and examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.data import Answering, FederatedText
from fedlpp_ray.federation.held import Held
from fedlpp_ray.privacy.view import Base, Means, Received, ViewError
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.state import State
from fedlpp_ray.tasks import Encoded, Tokens, collate, evaluation_batches
from fedlpp_ray.tasks.batches import Label
from fedlpp_ray.training import (
    Imitation,
    Training,
    client_descent,
    client_rules,
    constant_descent,
    mean_loss,
    opinions,
)


@dataclass(frozen=True)
class OwnText:
    """The text of colluders, and no other.

    Attributes:
        examples: Of each of them.
        pooled: Of all of them.
        steps: That each of them makes in a round.
        auxiliary: Which is no party's.
        answering: Writes what a model says of it.
        pad: Token id to pad with.
    """

    examples: Mapping[int, Tokens]
    pooled: Tokens
    steps: Mapping[int, int]
    auxiliary: Encoded
    answering: Answering
    pad: int


def own_text(experiment: Experiment, text: FederatedText, clients: Sequence[int]) -> OwnText:
    """That of clients of an experiment.

    Raises:
        AssetError, TaskError: auxiliary text cannot be used.
    """
    named = experiment.adversary.auxiliary
    return OwnText(
        {client: text.client(client) for client in clients},
        text.of_clients(np.concatenate([text.partition.indices(each) for each in clients])),
        {client: text.steps(client) for client in clients},
        () if named is None else text.auxiliary(named),
        text.answering(),
        text.pad,
    )


def _over_and_over(texts: Encoded, random: torch.Generator) -> Iterator[tuple[Tensor, Label]]:
    """Every text once in random order, again and again."""
    while True:
        yield from (texts[i] for i in torch.randperm(len(texts), generator=random).tolist())


class Colluders:
    """Clients that pool what they have. Implements `privacy.view.Tools`.

    Args:
        experiment: What was run.
        text: Theirs; its order is that of the colluders.
        held: The models that they have.
        means: What else they have.
        device: Where to compute.

    Attributes:
        clients: The colluders.
        bases: What they have.
        means: What else.

    Raises:
        UserError: they have too few examples.
    """

    def __init__(
        self,
        experiment: Experiment,
        text: OwnText,
        held: Mapping[Base, Held],
        means: frozenset[Means],
        device: torch.device,
    ) -> None:
        self._experiment, self._text, self._device = experiment, text, device
        self._held, self.bases, self.means = held, tuple(held), means
        self.clients = frozenset(text.examples)
        self._train, validation = self._split()
        size = experiment.evaluation.batch_size
        self._validation = evaluation_batches(validation, text.pad, size)

    def _split(self) -> tuple[Tokens, Tokens]:
        """Their examples to train on, and those to choose on."""
        pooled = self._text.pooled
        if len(pooled) < 2:
            raise UserError(
                "the adversary has one example, and needs one to train on and one to choose on; "
                "more adversary.colluders have more"
            )
        random = generator(self._experiment.seed, "adversary")
        order = torch.randperm(len(pooled), generator=random).numpy()
        share = self._experiment.adversary.validation
        count = min(max(1, round(share * len(pooled))), len(pooled) - 1)
        return pooled.take(order[count:]), pooled.take(order[:count])

    def loss(self, state: State, base: Base) -> float:
        """Mean loss on the validation examples, nats; infinite of a model that has diverged."""
        self._held[base].put(state)
        return self._loss(base)

    def _loss(self, base: Base) -> float:
        found = mean_loss(self._held[base].model, self._validation, self._device)
        return math.inf if math.isnan(found) else found

    def take_part(self, read: Received, client: int, base: Base) -> State:
        """A broadcast after a client's local training of its round, without SCAFFOLD's correction.

        Raises:
            ValueError: the client is no colluder.
        """
        if client not in self.clients:
            raise ValueError(f"client {client} is none of the adversary's")
        experiment, held = self._experiment, self._held[base]
        round = read.made
        held.put(read.start)
        method = find_method(experiment.server.aggregation)
        with held.state.training_only(method.trained(round)):
            Training(
                held.model,
                self._text.examples[client],
                experiment.client,
                steps=self._text.steps[client],
                seed=derive(experiment.seed, "local", round, client),
                pad=self._text.pad,
                device=self._device,
                descent=client_descent(experiment, round),
                rules=client_rules(experiment.client, read.columns),
            ).run()
        return held.state.read()

    def tune(self, state: State, base: Base) -> State:
        """The state of the lowest validation loss, the first included, at a constant rate."""
        experiment = self._experiment
        training = Training(
            self._held[base].model,
            self._train,
            experiment.client,
            steps=self._steps * experiment.adversary.max_looks,
            seed=derive(experiment.seed, "adversary"),
            pad=self._text.pad,
            device=self._device,
            descent=constant_descent(experiment.client),
        )
        return self._best(state, base, training.advance)

    def distil(self, state: State, teachers: Sequence[tuple[float, State]], base: Base) -> State:
        """The same while it learns on the auxiliary text what the teachers say of it.

        A text to be written is first written by the newest of them.

        Raises:
            ViewError: there is no auxiliary text.
        """
        if not self._text.auxiliary:
            raise ViewError("the adversary has no auxiliary text")
        held, client, (_, newest) = self._held[base], self._experiment.client, teachers[-1]
        imitation = Imitation(held.model, client, self._device)
        stream = _over_and_over(self._text.auxiliary, generator(self._experiment.seed, "auxiliary"))

        def advance(steps: int) -> None:
            student = held.state.read()
            chosen = list(islice(stream, steps * client.batch_size))
            texts = self._text.answering(chosen, held.put(newest), self._device)
            batches = [
                collate(texts[i : i + client.batch_size], self._text.pad)
                for i in range(0, len(texts), client.batch_size)
            ]
            said = [
                [weight * x for x in opinions(held.put(teacher), batches, self._device)]
                for weight, teacher in teachers
            ]
            held.state.write(student)
            imitation.advance(batches, [sum(x[1:], x[0]) for x in zip(*said, strict=True)])

        return self._best(state, base, advance)

    @property
    def _steps(self) -> int:
        """Between two looks: those of a client's round, with the examples that are trained on."""
        experiment = self._experiment
        return experiment.federation.steps(len(self._train), experiment.client.batch_size)

    def _best(self, state: State, base: Base, advance: Callable[[int], object]) -> State:
        """The state of the lowest validation loss, the first included, while it is trained on."""
        config = self._experiment.adversary
        held, best, lowest, since = self._held[base], state, self.loss(state, base), 0
        for _ in range(config.max_looks):
            advance(self._steps)
            found = self._loss(base)
            if found < lowest:
                best, lowest, since = held.state.read(), found, 0
            else:
                since += 1
            if since == config.patience:
                break
        return best
