"""Gradient inversion on a client's update: which tokens was its one step made of?

Beside D and u the server needs the client's learning rate and weight decay, which are the
experiment's, and a guess of how long the texts are: here the longest of the batch. By how much
`dp.clip` shortened the step it finds out of u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.data_probe import DataProbe, Seen
from fedlpp_ray.privacy import (
    Gradient,
    Inversion,
    PrivacyError,
    Span,
    clip_factor,
    gradient_of_step,
    measure_inversion,
    spans_of_a,
    spans_of_b,
    token_distances,
)
from fedlpp_ray.privacy.dp import norm
from fedlpp_ray.privacy.inversion import Optimizer
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.state import name_of
from fedlpp_ray.tasks import Encoded, epoch_order
from fedlpp_ray.training import client_descent, first_inputs

_CLIPPED = 1 - 1e-6
"""An update in fp32 that is shorter than this share of the clip was not clipped."""
_CHUNK = 512
"""Tokens whose inputs are in memory at a time."""


def check_inversion(experiment: Experiment) -> None:
    """Refuse experiments whose updates are not one step of LoRA on whole inputs.

    Raises:
        PrivacyError: naming the key and what is allowed.
    """
    client, down = experiment.client, experiment.downlink
    faults = {
        "adapter.kind: the probe reads LoRA; allowed: 'lora'": experiment.adapter.kind != "lora",
        "client.scaffold: the probe knows no client's variate; allowed: false": client.scaffold,
        "downlink.server_mask, client_mask: the probe needs all columns; allowed: 0": bool(
            down.server_mask or down.client_mask
        ),
    }
    for fault, found in faults.items():
        if found:
            raise PrivacyError(f"gradient inversion: {fault}")


def probe_inversion(
    probe: DataProbe, round: int, client: int, seen: Seen
) -> Mapping[str, Inversion]:
    """The tokens of a client's batch that its update of one step gives away.

    Tried is the whole vocabulary, at every position. Of a text to be written the last token, which
    the model never reads, is not among the batch's. With AdamW the attack takes the signs that the
    step has for a gradient; under a client's noise the entries as they are, for there rounding to
    signs loses more.

    Args:
        probe: The server's model.
        round: In which the client trained; the seed and it tell the batch.
        client: Which; it made one step.
        seen: As `DataProbe.decode` returns it.

    Returns:
        By the factor that was read: `A`, from dL/dA of all matrices that read the first layer's
        input; `B`, from each one's dL/dB and A. One that did not travel is left out.

    Raises:
        PrivacyError: as `check_inversion`, `clip_factor` and `first_inputs`; or the client made
            several steps.
    """
    experiment, text = probe.experiment, probe.text
    check_inversion(experiment)
    if (steps := text.steps(client)) != 1:
        raise PrivacyError(
            f"federation.local_steps: of {steps} steps the gradients are not known apart; "
            "gradient inversion allows 1"
        )
    probe.load(client, seen.broadcast)
    batch = step_examples(probe, round, client)
    positions = max(2, *(tokens.shape[-1] for tokens, _ in batch))
    kinds = (0, 1) if batch[0][0].ndim == 2 else (None,)
    layers = first_inputs(probe.model, torch.arange(2), 2, probe.device, kinds[0]).layers
    spans = _Spans(probe, round, seen).of(layers)
    found: dict[str, list[Tensor]] = {factor: [] for factor in spans}
    for tokens in torch.split(torch.arange(_vocabulary(probe)), _CHUNK):
        inputs = torch.cat(
            [first_inputs(probe.model, tokens, positions, probe.device, x).inputs for x in kinds], 1
        )
        for factor, held in spans.items():
            found[factor].append(token_distances(held, inputs))
    present = _read_tokens(batch)
    return {
        factor: measure_inversion(held, torch.cat(found[factor]), present)
        for factor, held in spans.items()
    }


def step_examples(probe: DataProbe, round: int, client: int) -> Encoded:
    """What a client's first step of a round is made of, as `Training` chooses it."""
    config, examples = probe.experiment.client, probe.text.client(client)
    random = generator(derive(probe.experiment.seed, "local", round, client), "order")
    by_length = config.group_by_length
    order = epoch_order(examples, config.batch_size, random, by_length=by_length)
    return [examples[i] for i in order[: config.batch_size]]


class _Spans:
    """What can be checked of the first layers."""

    def __init__(self, probe: DataProbe, round: int, seen: Seen) -> None:
        self._config, self._seen = probe.experiment.client, seen
        self._lr = client_descent(probe.experiment, round).travelled(self._config.lr, 1)
        self._error = probe.uplink_error()
        # Under noise AdamW's signs come back as its g does with SGD: u = -f lr (g + decay w).
        self._optimizer: Optimizer = "sgd" if seen.noise else self._config.optimizer
        self._factor = self._clipped_by()

    def _clipped_by(self) -> float:
        """f of `clip_factor`; 1 where u was not clipped."""
        seen = self._seen
        sure = not (self._error or seen.noise) and norm(seen.update) < _CLIPPED * seen.clip
        if sure or seen.clip == math.inf:
            return 1.0
        return clip_factor(
            seen.update,
            seen.broadcast,
            lr=self._lr,
            weight_decay=self._config.weight_decay,
            optimizer=self._config.optimizer,
            error=self._error,
            noise=seen.noise,
        )

    def of(self, layers: Sequence[str]) -> dict[str, list[Span]]:
        """By factor."""
        a, b = [name_of(x, "A") for x in layers], [name_of(x, "B") for x in layers]
        received, found = self._seen.broadcast, {}
        if self._seen.update.keys() >= set(a):
            # Of a few rows in many dimensions, noisy ones lean towards the inputs all the same.
            found["A"] = spans_of_a([self._gradient(name, 0.0, 0.0) for name in a])
        if self._seen.update.keys() >= set(b) and received.keys() >= set(a):
            # In r dimensions they would fill the span.
            gradients = [self._gradient(name, self._error, self._seen.noise) for name in b]
            found["B"] = spans_of_b(gradients, [received[name] for name in a])
        return found

    def _gradient(self, name: str, error: float, noise: float) -> Gradient:
        return gradient_of_step(
            self._seen.update[name],
            self._seen.broadcast[name],
            lr=self._lr,
            weight_decay=self._config.weight_decay,
            optimizer=self._optimizer,
            factor=self._factor,
            error=error,
            noise=noise,
        )


def _vocabulary(probe: DataProbe) -> int:
    words = probe.model.get_input_embeddings()  # type: ignore[operator]
    return int(words.num_embeddings)


def _read_tokens(batch: Encoded) -> set[int]:
    """The ids that the model reads of these examples."""
    found: set[int] = set()
    for tokens, label in batch:
        ids = (tokens if tokens.ndim == 1 else tokens[0]).tolist()
        found |= set(ids if isinstance(label, int) else ids[:-1])
    return found
