"""The local training of one client."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fedlpp_ray.config import ClientConfig
from fedlpp_ray.lora import trainable
from fedlpp_ray.seeds import derive, generator
from fedlpp_ray.tasks import collate
from fedlpp_ray.tasks.batches import Encoded
from fedlpp_ray.training.rules import PLAIN, ClientRule, Descent


def train_locally(
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
) -> float:
    """Train the model's trainable parameters in place with a fresh optimizer.

    Args:
        model: A classifier with adapters, holding what the client received.
        examples: The client's data; passed over in a new random order each epoch. The last batch
            of an epoch may be short.
        config: Learning rate, weight decay, batch size.
        steps: Optimizer steps.
        seed: Order of the examples and dropout depend on it alone.
        pad: Token id to pad with.
        device: Where the model is.
        descent: Which optimizer, and its learning rate from step to step.
        rules: Corrections of the gradient, in this order; each is used for this training only.

    Returns:
        Mean training loss over the steps, in nats.
    """
    parameters = trainable(model)
    optimizer = descent.make(parameters, config.lr, config.weight_decay)
    schedule = LambdaLR(optimizer, lambda step: descent.factor(step, steps))
    for rule in rules:
        rule.start(parameters)
    order = generator(seed, "order")
    queue: list[int] = []
    total = 0.0
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "dropout"))
        for _ in range(steps):
            if not queue:
                queue = torch.randperm(len(examples), generator=order).tolist()
            chosen, queue = queue[: config.batch_size], queue[config.batch_size :]
            batch = collate([examples[i] for i in chosen], pad)
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            for rule in rules:
                rule.adjust(parameters)
            optimizer.step()
            schedule.step()
            total += loss.item()
    model.eval()
    for rule in rules:
        rule.finish(parameters, descent.travelled(config.lr, steps))
    return total / steps
