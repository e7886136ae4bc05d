"""How a loss becomes a step of the optimizer: on every rank alike, or by ZeRO, stage 2."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlpp_ray.config import ZeroConfig
from fedlpp_ray.models import load_deepspeed
from fedlpp_ray.training.group import Group
from fedlpp_ray.training.rules import ClientRule, Parameters


class Updates(Protocol):
    """Steps of one optimizer."""

    def step(self, loss: Tensor) -> None:
        """Step along the gradient of the sum of all ranks' losses."""

    def save(self) -> dict[str, Any]:
        """What the optimizer remembers: the same on all ranks, which call this together."""

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what `save` returned, and from the parameters as they are now."""

    def end(self) -> None:
        """Leave the model as any other."""


class Alike:
    """Every rank has all gradients and all of the optimizer.

    Args:
        optimizer: Of the parameters.
        parameters: All that are trained.
        rules: Corrections of the gradient.
        group: The ranks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Parameters,
        rules: Sequence[ClientRule],
        group: Group,
    ) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._rules, self._group = rules, group

    def step(self, loss: Tensor) -> None:
        """Backward, sum over the ranks, correct, step."""
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._group.add(self._gradients())
        for rule in self._rules:
            rule.adjust(self._parameters)
        self._optimizer.step()

    def _gradients(self) -> list[Tensor]:
        """The same tensors on every rank: all that any rank's examples reach.

        A routed expert may have examples on some ranks and none on others, which add zeros. What no
        rank reaches keeps no gradient, as in one process.
        """
        parameters = list(self._parameters.values())
        reached = self._group.any([p.grad is not None for p in parameters])
        for parameter in compress(parameters, reached):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]

    def save(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self._optimizer.state_dict()

    def load(self, saved: dict[str, Any]) -> None:
        """Take it back."""
        self._optimizer.load_state_dict(saved)

    def end(self) -> None:
        """There is nothing to undo."""


class Spread:
    """Each rank has its share of the gradients and of the optimizer: ZeRO, stage 2.

    The optimizer works on the rank's share of all parameters as one tensor, a copy.

    Args:
        model: What is trained.
        optimizer: Of its trainable parameters; it is changed to be that of the share.
        zero: Its stage is 2.
        group: The ranks, which all make this at the same time.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, zero: ZeroConfig, group: Group
    ) -> None:
        kind = next(model.parameters()).device.type
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero.model_dump(),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # which would be compiled
            "gradient_clipping": 0.0,  # by default DeepSpeed clips to a norm of 1
        }
        deepspeed: Any = load_deepspeed(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Of what is trained alone: it sends rank 0's values of all that it is given.
            trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
            found = deepspeed.initialize(model=trained, optimizer=optimizer, config=config)
            self._engine = found[0]
        self._optimizer, self._group = optimizer, group

    def step(self, loss: Tensor) -> None:
        """DeepSpeed takes the mean over the ranks; here it is the sum."""
        self._engine.backward(loss * self._group.size)
        self._engine.step()

    def save(self) -> dict[str, Any]:
        """The shares of the optimizer's state, by rank."""
        return {"shares": self._group.gather(self._optimizer.state_dict())}

    def load(self, saved: dict[str, Any]) -> None:
        """Take the own share back, and renew the copy of the parameters.

        Without that the next step would bring the old ones back.
        """
        self._optimizer.load_state_dict(saved["shares"][self._group.rank])
        self._engine.optimizer.refresh_fp32_params()

    def end(self) -> None:
        """Take DeepSpeed's hooks off the parameters."""
        self._engine.destroy()
