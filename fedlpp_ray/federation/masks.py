"""FedQSN (arXiv 2508.18911): whole columns of the model that a client does not receive.

    D_i = deq(quant(S * M * M_i)),  M[:, j] = 0 for a share p1 of the columns, else 1 / (1 - p1)

M, the server's, stays the same for the whole run; M_i, with p2, is drawn anew for every client and
round among the columns that M leaves. Its full text could not be read; inferred are:

- What is masked: A and every matrix of the head. The columns of the product are B A[:, j], so
  masking A masks exactly the columns of what LoRA adds to a weight. Those of B are components of
  the rank: masking them too would take away rank, and scale the product twice. Vectors stay whole.
- How many: exactly the share, rounded, and at least one column is left, so that a message's size is
  known before it is read. The factor is columns / columns left, so that E[S * M_i] is S all the
  same.
- A client trains the columns it has and no other: masked ones are zero, get no gradient, and do not
  travel back.
- The server undoes the factor of its own mask, which is the same for all: what clients return would
  otherwise count 1 / (1 - p1) times. That of M_i stays: only a share 1 - p2 of the clients has a
  column, and 1 / (1 - p2) makes up for the others. If every client went to its masked view of one
  target, S * M * M_i -> T * M * M_i, the mean over the cohort would be T - S in expectation, in the
  columns that M leaves.

A column that the server's mask hides is trained by nobody: it stays as the server initialised it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlpp_ray.config import Experiment
from fedlpp_ray.messages import MessageError
from fedlpp_ray.seeds import generator
from fedlpp_ray.state import COLUMNS, Schema, State, part


class Masks:
    """Which columns travel, and how they are scaled. Without masks, everything as it is.

    Args:
        experiment: What is run.
        schema: Of the broadcast as the server has it, whole.
    """

    def __init__(self, experiment: Experiment, schema: Schema) -> None:
        down, self._seed = experiment.downlink, experiment.seed
        self._left: dict[str, tuple[int, int, int]] = {}
        if down.server_mask or down.client_mask:
            for name, shape in schema.items():
                if part(name) in ("A", "head") and len(shape) == 2:
                    ours = _left(shape[1], down.server_mask)
                    self._left[name] = (shape[1], ours, _left(ours, down.client_mask))

    def schema(self, schema: Schema) -> Schema:
        """Names and shapes as they travel, of all or part of the broadcast's tensors."""
        return {
            name: (shape[0], self._left[name][2]) if name in self._left else shape
            for name, shape in schema.items()
        }

    @property
    def flags(self) -> Schema:
        """Names and shapes of the flags that travel with a broadcast."""
        return {f"{COLUMNS}{name}": (columns,) for name, (columns, _, _) in self._left.items()}

    def draw(self, round: int, edition: int) -> State:
        """The flags of the columns that one edition of a round's broadcast has, fp32."""
        flags = {}
        for name, (columns, ours, sent) in self._left.items():
            server = generator(self._seed, "server mask", name)
            client = generator(self._seed, "client mask", name, round, edition)
            kept = torch.randperm(columns, generator=server)[:ours]
            kept = kept[torch.randperm(ours, generator=client)[:sent]]
            flags[f"{COLUMNS}{name}"] = torch.zeros(columns).index_fill(0, kept, 1.0)
        return flags

    def apply(self, state: State, flags: State) -> State:
        """What travels of a state: the flagged columns, scaled, and the flags."""
        scaled = {
            name: tensor * (self._left[name][0] / self._left[name][2])
            if name in self._left
            else tensor
            for name, tensor in state.items()
        }
        return cut(scaled, flags) | flags

    def settle(self, update: State, flags: State) -> State:
        """A client's update in the server's units and whole, zero where the client has no column.

        Raises:
            MessageError: as `fill`.
        """
        return {
            name: tensor * (self._left[name][1] / self._left[name][0])
            if name in self._left
            else tensor
            for name, tensor in fill(update, flags).items()
        }


def cut(state: State, flags: State) -> State:
    """The flagged columns of each tensor that has flags; any other tensor whole."""
    return {
        name: tensor if (kept := columns_of(name, flags)) is None else tensor[:, kept]
        for name, tensor in state.items()
    }


def fill(state: State, flags: State) -> State:
    """The inverse of `cut`, with zeros for the columns that did not travel.

    Raises:
        MessageError: the flags are of another number of columns than travelled.
    """
    whole = {}
    for name, tensor in state.items():
        kept = columns_of(name, flags)
        if kept is None:
            whole[name] = tensor
        elif int(kept.sum()) != tensor.shape[1]:
            raise MessageError(
                f"{name}: {int(kept.sum())} columns are flagged, {tensor.shape[1]} travel"
            )
        else:
            whole[name] = tensor.new_zeros(tensor.shape[0], len(kept))
            whole[name][:, kept] = tensor
    return whole


def columns_of(name: str, flags: State) -> Tensor | None:
    """Of a tensor the columns that have come, bool; None: it has no flags, and is whole."""
    found = flags.get(f"{COLUMNS}{name}")
    return None if found is None else found.bool()


def all_columns(received: State) -> State:
    """The flags that have come with a broadcast, by the tensor that they are of."""
    return {n.removeprefix(COLUMNS): t for n, t in received.items() if part(n) == "columns"}


def _left(columns: int, share: float) -> int:
    """Columns left by a mask."""
    return max(1, columns - round(share * columns))
