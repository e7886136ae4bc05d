"""The methods by the name that `server.aggregation` gives them.

One of your own is any `Method` in a module of your own: `server.aggregation: package.module:NAME`.
"""

from __future__ import annotations

import importlib

from fedlpp_ray.aggregation.methods.base import Method, Return, Target, always, mean_update
from fedlpp_ray.aggregation.methods.fedex_lora import FEDEX_LORA
from fedlpp_ray.aggregation.methods.fedit import FEDIT
from fedlpp_ray.aggregation.methods.fedsa_lora import FEDSA_LORA
from fedlpp_ray.aggregation.methods.ffa_lora import FFA_LORA
from fedlpp_ray.aggregation.methods.flexlora import FLEXLORA
from fedlpp_ray.aggregation.methods.flora import FLORA
from fedlpp_ray.aggregation.methods.hetlora import HETLORA
from fedlpp_ray.aggregation.methods.lora_fair import LORA_FAIR
from fedlpp_ray.aggregation.methods.rolora import ROLORA
from fedlpp_ray.errors import UserError

METHODS: dict[str, Method] = {
    "fedit": FEDIT,
    "ffa-lora": FFA_LORA,
    "rolora": ROLORA,
    "fedsa-lora": FEDSA_LORA,
    "flora": FLORA,
    "fedex-lora": FEDEX_LORA,
    "flexlora": FLEXLORA,
    "hetlora": HETLORA,
    "lora-fair": LORA_FAIR,
}


def find_method(name: str) -> Method:
    """The method of this name, or the one at `package.module:NAME`.

    Raises:
        UserError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"server.aggregation = '{name}': {error}") from error
    if not isinstance(found, Method):
        raise UserError(
            f"server.aggregation = '{name}': allowed: {', '.join(METHODS)}, or package.module:NAME "
            "of a fedlpp_ray.aggregation.Method"
        )
    return found


__all__ = ["METHODS", "Method", "Return", "Target", "always", "find_method", "mean_update"]
