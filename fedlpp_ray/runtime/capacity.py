"""Whether memory and GPUs suffice for the actors of a run, from what they are expected to need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedlpp_ray.federation.footprint import CUDA_CONTEXT, Role
from fedlpp_ray.federation.peaks import Peak
from fedlpp_ray.runtime.nodes import GIB, Node

CLOSE = 0.9
"""Share of a memory from which on its use is called close."""


@dataclass(frozen=True)
class Actors:
    """Actors of one role.

    Attributes:
        role: Their part.
        count: How many, each rank one; 0 clients in a run that is no federation.
        cpus, gpus: What each reserves.
        peak: Memory of each.
    """

    role: Role
    count: int
    cpus: float
    gpus: float
    peak: Peak

    def words(self, threads: int) -> str:
        """One line: how many, on what, with how much memory and why."""
        alone = self.role == "server" and self.count == 1
        many, each = ("", "") if alone else (f"{self.count} x ", " each")
        gpu = f" + {self.gpus:g} GPU" if self.gpus else ""
        where = " of the GPU" if self.gpus else ""
        return (
            f"{many}{self.cpus:g} CPU{gpu}, {counted(threads, 'thread')}, about "
            f"{in_gib(self.peak.size)}{where}{each} ({self.peak.why()})"
        )


def memory_notes(parties: Sequence[Actors], trials: int, nodes: Sequence[Node]) -> Iterator[str]:
    """Whether what one run, times `trials`, is expected to need is close to the nodes' memory.

    What processes of a node share is counted once a node.
    """
    private = sum(actors.count * max(0, actors.peak.host - _mapped(actors)) for actors in parties)
    needed = trials * private + len(nodes) * max(map(_mapped, parties))
    there = all_memory(nodes)
    if there is not None and needed > CLOSE * there:
        yield (
            f"about {in_gib(needed)} of {in_gib(there)} of memory: lower runtime.client_actors, "
            "client.batch_size or evaluation.batch_size"
        )


def memory_faults(parties: Sequence[Actors], nodes: Sequence[Node]) -> Iterator[str]:
    """What cannot fit the nodes' memory, however short the texts are."""
    there = all_memory(nodes)
    if there is None:
        return
    largest = max(node.memory or 0 for node in nodes)
    for actors in parties:
        certain = actors.peak.footprint.host_certain
        if certain > largest:
            yield (
                f"the {actors.role} needs {in_gib(certain)} of memory for its process, weights and "
                f"what it trains alone; the largest node has {in_gib(largest)}. Use a smaller "
                "model or a larger node"
            )
    private = sum(a.count * (a.peak.footprint.host_certain - _mapped(a)) for a in parties)
    together = private + max(map(_mapped, parties))  # the latter on one node at least
    if together > there:
        yield (
            f"the run needs {in_gib(together)} of memory for its processes, weights and what they "
            f"train alone; the cluster has {in_gib(there)}. Lower runtime.client_actors or use a "
            "larger cluster"
        )


def _mapped(actors: Actors) -> int:
    """What is on each node once, however many actors are there; on a GPU's node, while it loads."""
    return actors.peak.footprint.mapped


def _cap(actors: Actors, card: int) -> float:
    """Bytes of a card that an actor may have: its share, or all that CUDA leaves."""
    return min(actors.gpus * card, card - CUDA_CONTEXT)


def card_faults(actors: Actors, card: int | None) -> Iterator[str]:
    """What cannot fit an actor's share of a card, however short the texts are."""
    if not actors.gpus or card is None:
        return
    certain, cap = actors.peak.footprint.certain, _cap(actors, card)
    if certain > cap:
        yield (
            f"the {actors.role} needs {in_gib(certain)} of GPU memory for its weights and what it "
            f"trains alone; runtime.{actors.role}_gpus = {actors.gpus:g} of {in_gib(card)} is "
            f"{in_gib(cap)}. Raise it, or lower client.base_bits"
        )


def card_notes(actors: Actors, card: int | None) -> Iterator[str]:
    """Whether a share of a GPU is too small or larger than need be."""
    if not actors.gpus:
        return
    key = f"runtime.{actors.role}_gpus"
    if card is None:
        yield f"whether {key} = {actors.gpus:g} is enough is unknown, as is the GPU's memory"
        return
    if actors.peak.size > CLOSE * _cap(actors, card):
        yield (
            f"about {in_gib(actors.peak.size)} of the {in_gib(_cap(actors, card))} that {key} = "
            f"{actors.gpus:g} allows: raise it, or lower client.batch_size or client.base_bits"
        )
        return
    fit = int(card // (actors.peak.size / CLOSE + CUDA_CONTEXT))
    if actors.role == "client" and fit > 1 / actors.gpus + 1e-6:
        yield (
            f"{fit} of {in_gib(actors.peak.size)} fit on a card of {in_gib(card)}: {key} could be "
            f"{int(1000 / fit) / 1000:g}"
        )


def all_memory(nodes: Sequence[Node]) -> int | None:
    """Bytes of all nodes, or None where one's are unknown."""
    known = [node.memory for node in nodes if node.memory is not None]
    return sum(known) if len(known) == len(nodes) else None


def smallest_card(nodes: Sequence[Node]) -> int | None:
    """Bytes of the smallest GPU, or None where one is unknown or there is none."""
    cards = [node.card for node in nodes if node.gpus]
    known = [card for card in cards if card is not None]
    return min(known) if known and len(known) == len(cards) else None


def all_cores(nodes: Sequence[Node]) -> float:
    """CPUs of all nodes."""
    return sum(node.cpus for node in nodes)


def counted(number: float, what: str) -> str:
    """A number and its noun: 1 thread, 2 threads."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def in_gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.1f} GiB"
