"""The training of one model on one party's examples."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedlpp_ray.config import ClientConfig, ZeroConfig
from fedlpp_ray.lora import trainable
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.tasks import IGNORED, Encoded, collate, epoch_order
from fedlpp_ray.training.device import compute_dtype, computing
from fedlpp_ray.training.group import ALONE, Group
from fedlpp_ray.training.loss import predictions, smoothed_loss
from fedlpp_ray.training.rules import PLAIN, ClientRule, Descent
from fedlpp_ray.training.updates import Alike, Spread, Updates

_PLAIN_ZERO = ZeroConfig()


class Training:
    """Trains a model's trainable parameters in place with a fresh optimizer.

    In several parts it gives the same bits as in one.

    Args:
        model: A classifier or causal language model with adapters, holding what it starts from.
        examples: Passed over in a new random order each epoch. The last batch of an epoch may be
            short.
        config: Learning rate, weight decay, label smoothing, batch size.
        steps: Optimizer steps in all, to which the learning rates are spread.
        seed: Order of the examples and dropout depend on it alone.
        pad: Token id to pad with.
        device: Where the model is.
        descent: Which optimizer, and its learning rate from step to step.
        rules: Corrections of the gradient, in this order; each is used for this training only.
        group: Ranks that share each batch; all of them train at the same time. The gradient is
            that of the batch, and dropout is another on each rank.
        zero: With stage 2 the ranks share gradients and optimizer, and there are no rules.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Encoded,
        config: ClientConfig,
        *,
        steps: int,
        seed: int,
        pad: int,
        device: torch.device,
        descent: Descent = PLAIN,
        rules: Sequence[ClientRule] = (),
        group: Group = ALONE,
        zero: ZeroConfig = _PLAIN_ZERO,
    ) -> None:
        self._model, self._examples, self._config = model, examples, config
        self._pad, self._device, self._rules, self._group = pad, device, rules, group
        self._steps, self._travelled = steps, descent.travelled(config.lr, steps)
        self._parameters, self._dtype = trainable(model), compute_dtype(model)
        self._optimizer = descent.make(self._parameters, config.lr, config.weight_decay)
        self._updates: Updates = Alike(self._optimizer, self._parameters, rules, group)
        if zero.stage == 2:
            self._updates = Spread(model, self._optimizer, zero, group)
        self._schedule = LambdaLR(self._optimizer, lambda step: descent.factor(step, steps))
        self._order = generator(seed, "order")
        self._queue: list[int] = []
        with torch.random.fork_rng():
            own = (group.rank,) if group.rank else ()
            torch.manual_seed(derive(seed, "dropout", *own))
            self._random = self._generators()
        for rule in rules:
            rule.start(self._parameters)

    def run(self) -> float:
        """Make all steps at once and end the rules; returns the mean loss, in nats."""
        loss = self.advance(self._steps)
        for rule in self._rules:
            rule.finish(self._parameters, self._travelled)
        self._updates.end()
        return loss

    def advance(self, steps: int) -> float:
        """Make so many steps; the model is left in training mode.

        Returns:
            Mean training loss over them, in nats.
        """
        self._model.train()
        with torch.random.fork_rng():
            self._use(self._random)
            losses = [self._step() for _ in range(steps)]
            self._random = self._generators()
        # Read once: reading a number of a GPU waits for all that it has to do.
        found = torch.stack(losses)
        self._group.add([found])
        total: float = sum(found.tolist())
        return total / steps

    def _step(self) -> Tensor:
        loss = self._loss(self._choose())
        self._updates.step(loss)
        self._schedule.step()
        return loss.detach()

    def _loss(self, chosen: Sequence[int]) -> Tensor:
        """This rank's part of the mean loss of a batch."""
        own = self._group.part(chosen)
        # A rank without any runs the model all the same, as a sharded one needs.
        batch = collate([self._examples[i] for i in own or chosen[:1]], self._pad)
        with computing(self._dtype, self._device):
            logits, labels = predictions(self._model, batch, self._device)
            loss = smoothed_loss(logits, labels, self._config.label_smoothing)
        if self._group.size == 1:
            return loss
        share = self._targets(own) / self._targets(chosen)
        # Through the model all the same, whose layers the other ranks gather in the backward pass.
        return loss * share if share else logits.nan_to_num(0.0, 0.0, 0.0).sum() * 0.0

    def _targets(self, chosen: Sequence[int]) -> int:
        """Labels over which the loss of some examples is the mean."""
        labels = [self._examples[i][1] for i in chosen]
        return sum(1 if isinstance(x, int) else int((x[1:] != IGNORED).sum()) for x in labels)

    def _choose(self) -> list[int]:
        """The next batch's examples."""
        size = self._config.batch_size
        if not self._queue:
            self._queue = epoch_order(
                self._examples, size, self._order, by_length=self._config.group_by_length
            )
        chosen, self._queue = self._queue[:size], self._queue[size:]
        return chosen

    def save(self) -> bytes:
        """All but the model's parameters, to go on from: the same bytes on all ranks, together."""
        file = io.BytesIO()
        random, *others = self._group.gather(self._random)
        state = {
            "optimizer": self._updates.save(),
            "schedule": self._schedule.state_dict(),
            "order": self._order.get_state(),
            "queue": self._queue,
            "random": random,
            "others": others,
        }
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Go on from what `save` returned; the model holds the parameters of that time.

        There are as many ranks as there were.
        """
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self._updates.load(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._order.set_state(state["order"])
        self._queue = state["queue"]
        self._random = [state["random"], *state.get("others", [])][self._group.rank]

    def _generators(self) -> list[Tensor]:
        """States of torch's generators that dropout draws from."""
        found = [torch.get_rng_state()]
        return [*found, torch.cuda.get_rng_state()] if self._device.type == "cuda" else found

    @staticmethod
    def _use(states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state)
