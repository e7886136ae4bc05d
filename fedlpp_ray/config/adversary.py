"""Who attacks the model, and what they know: the threat model of the attack ladder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedlpp_ray.config.section import Name, Positive, Section

Watched = Literal[
    "unmasked-broadcast",
    "mean-factors",
    "mean-products",
    "recent-factors",
    "recent-products",
    "trend",
    "trend-products",
    "interval",
    "intersection",
    "crossings",
    "aligned-last",
    "aligned-factors",
    "aligned-trend",
    "aligned-interval",
]
"""The attacks that are arithmetic on broadcasts, need no example of the adversary's and leave an
adapter of its rank."""


ALL = ("all",)
"""Of `at_end`: every attack of the ladder."""


def _listed(value: Any) -> Any:
    """A name alone, such as `all`, is a list of one."""
    return (value,) if isinstance(value, str) else value


class AdversaryConfig(Section):
    """Clients that do as they should, and keep what they receive. No key changes a bit of a run."""

    base: Literal["public", "proprietary"] | None = None
    """Whether they have W0 in full precision: `public`, as a model of a hub. None: public, except
    where clients have an emulator (`emulator.kind`), which is made because W0 is not."""
    colluders: Positive = 1
    """Clients that pool broadcasts, examples and updates: the strongest, then those with most
    examples."""
    rounds: Literal["all", "sampled"] = "all"
    """Of which rounds they have the broadcasts: `sampled`, those in which one of them took part; or
    `all`, the worst case: they take part in every round, or wait until they were chosen often."""
    architecture: Literal["known", "unknown"] = "known"
    """Whether they know what the tensors of a broadcast are. `unknown`: the client's software is a
    black box to them, as in an enclave. It trains as in a round and measures, and they can put
    tensors into it; but there are no products, no gauge, no other base and no training beside."""
    auxiliary: str | None = None
    """Text of their own beside their clients' examples, whatever `task.data` may be, split "train".
    Of classification it has the task's text columns, of task `generation` those of `task.prompt`,
    of other text to write a column "prompt". Labels and targets are not read, and what is held out
    is left out. None: they have none."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of their own examples on which they choose; they train attacks on the rest."""
    patience: Positive = 3
    """Fine-tuning on their own examples stops after so many looks without a better validation
    loss."""
    max_looks: Positive = 20
    """Looks at most, one after as many steps as a client makes in a round."""
    watch: Annotated[tuple[Watched, ...], Field(strict=False)] = ("trend",)
    """Attacks that the run itself measures while it goes on, in the client's base and of the
    broadcasts of all rounds, beside `client_before`, which is the newest broadcast as it is. Each
    costs one evaluation. []: none."""
    watch_every: Positive = 5
    """In so many rounds once, in the first of them that is evaluated, and after the last round."""
    watch_window: Positive = 6
    """They are given so many of the newest broadcasts, which are part of each checkpoint. `trend`
    reads no more in any case."""
    at_end: Annotated[tuple[Name, ...], Field(strict=False), BeforeValidator(_listed)] = ()
    """Attacks of the ladder, or `all`, that the run makes once it is finished: at a client host, in
    its own reservation, with the numbers of `python -m fedlpp_ray.attack`. A trial's checkpoints
    then hold every broadcast. Where the server has no model that clients could have, none."""
