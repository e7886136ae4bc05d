"""How a model is spread over the ranks of one party."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from fedlpp_ray.config.section import Section


class ZeroConfig(Section):
    """DeepSpeed's `zero_optimization`, handed over whole: beside these keys, all that it has.

    For instance `offload_param: {device: cpu}`, or `{device: nvme, nvme_path: /local_nvme}`.
    DeepSpeed itself says what is allowed, before anything starts.
    """

    model_config = ConfigDict(extra="allow")

    stage: Literal[0, 2, 3] = 0
    """3: each rank holds a share of the frozen model, and a layer is whole only while it is used.
    2: each has the whole model, and a share of the gradients and the optimizer of what is trained.
    0: each has all. Whichever it is, the ranks share the batches."""
    memory_efficient_linear: bool = False
    """DeepSpeed's default, true, replaces torch's linear function in the whole process."""
