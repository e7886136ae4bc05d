"""What colluding clients can compute: `privacy.view.Tools` on their models and examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import FULL_PRECISION, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.emulation import correction_of, load_client_base
from fedlpp_ray.federation.means import means_of
from fedlpp_ray.federation.sampling import colluders
from fedlpp_ray.lora import (
    ModelState,
    add_adapter,
    add_residuals,
    at_rank,
    store_in_bf16,
    with_residuals,
)
from fedlpp_ray.privacy.view import Base, ViewError
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.state import State, part
from fedlpp_ray.tasks import Encoded, Metrics, Tokens, collate, evaluation_batches
from fedlpp_ray.tasks.batches import Label
from fedlpp_ray.training import (
    FedProx,
    Imitation,
    Scored,
    Training,
    client_descent,
    mean_loss,
    opinions,
    whole_descent,
)


def bases_of(experiment: Experiment) -> tuple[Base, ...]:
    """The frozen models of the colluders; W0 is not named twice where clients have it anyhow."""
    has_all = experiment.client.base_bits == FULL_PRECISION and experiment.client.compute == "fp32"
    adversary = experiment.adversary
    public = adversary.base != "proprietary" and experiment.emulator.kind == "none"
    if has_all or not public or adversary.architecture == "unknown":
        return ("client",)
    # The server's correction is made of W0 and of the quantizer, which who has W0 knows.
    corrected = experiment.server.base_correction > 0
    return ("client", "public", "corrected") if corrected else ("client", "public")


def _corrected_base(experiment: Experiment, text: FederatedText) -> nn.Module:
    """W0 + R, as the server measures its model on."""
    base = load_base(experiment, text)
    correction = correction_of(experiment, base)
    assert correction is not None
    correction.fold()
    return base


def _over_and_over(texts: Encoded, random: torch.Generator) -> Iterator[tuple[Tensor, Label]]:
    """Every text once in random order, again and again."""
    while True:
        yield from (texts[i] for i in torch.randperm(len(texts), generator=random).tolist())


class Held:
    """A frozen model with an adapter to put states into.

    Args:
        experiment: Says which adapter.
        base: The frozen model; it is changed.
        device: Where it goes.
        compute: As of `client.compute`.
    """

    def __init__(
        self, experiment: Experiment, base: nn.Module, device: torch.device, compute: str = "fp32"
    ) -> None:
        adapter, lora = experiment.adapter, experiment.lora
        self.model = add_adapter(base, adapter, lora, experiment.seed).to(device)
        method = find_method(experiment.server.aggregation)
        if method.writes_base and experiment.server.send_residual:
            add_residuals(self.model)
        self.state = ModelState(self.model)
        self.initial = self.state.read()
        if compute == "bf16":
            store_in_bf16(self.model)


class Bench:
    """The colluders' models, and their own examples. Implements `privacy.view.Tools`.

    Args:
        experiment: What was run.
        text: Its text; of the clients' shares only the colluders' are read.
        device: Where to compute.
        emulator: What clients have in the place of W0, if they do.

    Attributes:
        clients: The colluders.
        bases: What they have.
        means: What else.
        auxiliary: Number of texts of their own.

    Raises:
        AssetError, TaskError: the model or auxiliary text cannot be used.
    """

    def __init__(
        self,
        experiment: Experiment,
        text: FederatedText,
        device: torch.device,
        emulator: bytes | None,
    ) -> None:
        self._experiment, self._text, self._device = experiment, text, device
        self.bases, self.means = bases_of(experiment), means_of(experiment)
        named = experiment.adversary.auxiliary
        self._auxiliary: Encoded = () if named is None else text.auxiliary(named)
        self.auxiliary = len(self._auxiliary)
        base, compute = load_client_base(experiment, text, emulator), experiment.client.compute
        self._held: dict[Base, Held] = {"client": Held(experiment, base, device, compute)}
        if "public" in self.bases:
            self._held["public"] = Held(experiment, load_base(experiment, text), device)
        if "corrected" in self.bases:
            self._held["corrected"] = Held(experiment, _corrected_base(experiment, text), device)
        own = colluders(experiment, text.examples)
        self.clients = frozenset(own)
        self._train, validation = self._split(own)
        size = experiment.evaluation.batch_size
        self._validation = evaluation_batches(validation, text.pad, size)

    @property
    def initial(self) -> State:
        """What every client has from the seed before the first broadcast."""
        return self._held["client"].initial

    def _split(self, own: Sequence[int]) -> tuple[Tokens, Tokens]:
        """The colluders' examples to train on, and those to choose on."""
        indices = np.concatenate([self._text.partition.indices(client) for client in own])
        random = generator(self._experiment.seed, "adversary")
        indices = indices[torch.randperm(len(indices), generator=random).numpy()]
        if len(indices) < 2:
            raise UserError(
                "the adversary has one example, and needs one to train on and one to choose on; "
                "more adversary.colluders have more"
            )
        share = self._experiment.adversary.validation
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        return self._text.of_clients(indices[count:]), self._text.of_clients(indices[:count])

    def loss(self, state: State, base: Base) -> float:
        """Mean loss on the validation examples, nats; infinite of a model that has diverged."""
        self._put(state, base)
        return self._loss(base)

    def _loss(self, base: Base) -> float:
        found = mean_loss(self._held[base].model, self._validation, self._device)
        return math.inf if math.isnan(found) else found

    def take_part(self, state: State, client: int, round: int, base: Base) -> State:
        """The state after a client's local training of a round, without SCAFFOLD's correction.

        Raises:
            ValueError: the client is no colluder.
        """
        if client not in self.clients:
            raise ValueError(f"client {client} is none of the adversary's")
        experiment, held = self._experiment, self._held[base]
        self._put(state, base)
        mu = experiment.client.proximal
        method = find_method(experiment.server.aggregation)
        with held.state.training_only(method.trained(round)):
            Training(
                held.model,
                self._text.client(client),
                experiment.client,
                steps=self._text.steps(client),
                seed=derive(experiment.seed, "local", round, client),
                pad=self._text.pad,
                device=self._device,
                descent=client_descent(experiment, round),
                rules=[FedProx(mu)] if mu else [],
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
        )
        return self._best(state, base, training.advance)

    def distil(self, state: State, teachers: Sequence[tuple[float, State]], base: Base) -> State:
        """The same while it learns on the auxiliary text what the teachers say of it.

        A text to be written is first written by the newest of them.

        Raises:
            ViewError: there is no auxiliary text.
        """
        if not self._auxiliary:
            raise ViewError("the adversary has no auxiliary text")
        held, client, (_, newest) = self._held[base], self._experiment.client, teachers[-1]
        imitation = Imitation(held.model, client, self._device)
        stream = _over_and_over(self._auxiliary, generator(self._experiment.seed, "auxiliary"))

        def advance(steps: int) -> None:
            student = held.state.read()
            chosen = list(islice(stream, steps * client.batch_size))
            texts = self._text.answered(chosen, self._put(newest, base), self._device)
            batches = [
                collate(texts[i : i + client.batch_size], self._text.pad)
                for i in range(0, len(texts), client.batch_size)
            ]
            said = [
                [weight * x for x in opinions(self._put(teacher, base), batches, self._device)]
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

    def measure(self, state: State, base: Base) -> Metrics:
        """Of a state on the held-out examples, which no attack sees."""
        return self._text.evaluate(self._put(state, base), self._device)

    def score(self, state: State, base: Base) -> Scored:
        """As `measure`, and each held-out example for itself.

        A state may have a residual of every adapted layer, also where the model has none.
        """
        held = self._held[base]
        extra = any(part(name) == "residual" for name in state.keys() - held.initial.keys())
        with with_residuals(held.model) if extra else nullcontext():
            (ModelState(held.model) if extra else held.state).write(state)
            return self._text.score(held.model, self._device)

    def alone(self) -> dict[str, Scored]:
        """What the strongest colluder has without taking part, as the run's `Floor` names it."""
        experiment, strongest = self._experiment, self._text.strongest
        held, rank = self._held["client"], experiment.lora.rank_of(strongest)
        found = {"base": self.score(self.initial, "client")}
        self._put({n: at_rank(n, x, rank) for n, x in self.initial.items()}, "client")
        Training(
            held.model,
            self._text.client(strongest),
            experiment.client,
            steps=experiment.federation.rounds * self._text.steps(strongest),
            seed=derive(experiment.seed, "local", 0, strongest),
            pad=self._text.pad,
            device=self._device,
            descent=whole_descent(experiment),
        ).run()
        return found | {"local_only": self._text.score(held.model, self._device)}

    def _put(self, state: State, base: Base) -> nn.Module:
        self._held[base].state.write(state)
        return self._held[base].model
