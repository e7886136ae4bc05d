"""What a run will take of the cluster, said before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.footprint import CUDA_CONTEXT, Role
from fedlpp_ray.federation.peaks import Peak, expected_peak
from fedlpp_ray.runtime.nodes import GIB, Node, cluster_nodes
from fedlpp_ray.runtime.placement import PlacementError, bundles, check_fits, client_actors

CLOSE = 0.9
"""Share of a memory from which on its use is called close."""


@dataclass(frozen=True)
class Actors:
    """Actors of one role.

    Attributes:
        role: Their part.
        count: How many; 0 clients in a run that is no federation.
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
        many, each = (f"{self.count} x ", " each") if self.role == "client" else ("", "")
        gpu = f" + {self.gpus:g} GPU" if self.gpus else ""
        where = " of the GPU" if self.gpus else ""
        return (
            f"{many}{self.cpus:g} CPU{gpu}, {_count(threads, 'thread')}, about "
            f"{_gib(self.peak.size)}{where}{each} ({self.peak.why()})"
        )


@dataclass(frozen=True)
class Plan:
    """Where a run's actors will be, and what does not fit there.

    Attributes:
        nodes: The cluster's, those that it may start included.
        server, clients: The actors.
        threads: Torch threads of each actor.
        trials: Runs side by side.
        notes: What is close, slow or wasted, with the keys to change.
        faults: What cannot work.
    """

    nodes: tuple[Node, ...]
    server: Actors
    clients: Actors
    threads: int
    trials: int
    notes: tuple[str, ...]
    faults: tuple[str, ...]

    def lines(self) -> list[str]:
        """What is printed before anything starts."""
        found = [f"placement {_nodes_words(self.nodes)}", f"  server  {self._words(self.server)}"]
        if self.clients.count:
            found.append(f"  clients {self._words(self.clients)}")
        cores = _count(_cores(self.nodes), "core")
        rest = "; the server rests while clients train" if self.clients.count else ""
        trials = f"{_count(self.trials, 'trial')} side by side, " if self.trials > 1 else ""
        busy = _busy(self.clients.count, self.threads, self.trials)
        found.append(f"  load    {trials}{_count(busy, 'thread')} at a time on {cores}{rest}")
        return found + [f"  note    {note}" for note in self.notes]

    def _words(self, actors: Actors) -> str:
        return actors.words(self.threads)

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            PlacementError: a party's process, weights and what it trains alone are more than its
                share of a GPU or any node's memory; or all parties' are more than the
                cluster's, though the pages of W0 are not counted, which processes share.
        """
        if self.faults:
            raise PlacementError(self.faults[0])


def plan(experiment: Experiment, nodes: Sequence[Node], *, most_trials: int = 1) -> Plan:
    """The placement of a run, or of the runs of a sweep, on these nodes.

    Args:
        experiment: What to run; of a sweep its base.
        nodes: The cluster's.
        most_trials: Runs that a sweep would have side by side if there was room for all.

    Raises:
        AssetError, LoraError, LayersError: the model cannot be used.
    """
    runtime, federated = experiment.runtime, experiment.method == "federated"
    expected = expected_peak(experiment, "server")
    server = Actors("server", 1, runtime.server_cpus, runtime.server_gpus, expected)
    count = client_actors(experiment) if federated else 0
    peak = expected_peak(experiment, "client") if federated else expected
    clients = Actors("client", count, runtime.client_cpus, runtime.client_gpus, peak)
    trials = max(1, min(most_trials, _room(experiment, nodes)))
    parties = [server, clients] if federated else [server]
    notes = [
        *_crowding(count, runtime.threads, trials, nodes),
        *_memory_notes(parties, trials, nodes),
        *(note for actors in parties for note in _card_notes(actors, _card(nodes))),
    ]
    faults = [
        *(fault for actors in parties for fault in _card_faults(actors, _card(nodes))),
        *_memory_faults(parties, nodes),
    ]
    return Plan(tuple(nodes), server, clients, runtime.threads, trials, tuple(notes), tuple(faults))


def show_plan(experiment: Experiment, console: Console, *, most_trials: int = 1) -> None:
    """Print the plan for the connected cluster, and refuse what cannot work there.

    Raises:
        PlacementError: as `check_fits` for one run, and as `Plan.check`.
    """
    check_fits(bundles(experiment))
    made = plan(experiment, cluster_nodes(experiment), most_trials=most_trials)
    for line in made.lines():
        console.print(line, highlight=False, markup=False)
    made.check()


def _room(experiment: Experiment, nodes: Sequence[Node]) -> int:
    """Runs for which the cluster has CPUs and GPUs at a time, if it can be cut at will."""
    needed = bundles(experiment)
    cpus = sum(bundle["CPU"] for bundle in needed)
    gpus = sum(bundle.get("GPU", 0) for bundle in needed)
    room = (_cores(nodes) + 1e-6) // cpus
    return int(min(room, (sum(node.gpus for node in nodes) + 1e-6) // gpus) if gpus else room)


def _busy(clients: int, threads: int, trials: int) -> int:
    """Threads that compute at a time. The server rests while clients train; to evaluate, it and
    one client compute."""
    return trials * max(clients, 2 if clients else 1) * threads


def _crowding(clients: int, threads: int, trials: int, nodes: Sequence[Node]) -> Iterator[str]:
    busy, cores = _busy(clients, threads, trials), _cores(nodes)
    if busy > cores:
        keys = "runtime.threads or runtime.client_actors" if clients else "runtime.threads"
        sweep = ", or tune_config.max_concurrent_trials" if trials > 1 else ""
        yield (
            f"{_count(busy, 'thread')} would take turns on {_count(cores, 'core')}: lower "
            f"{keys}{sweep}"
        )


def _memory_notes(parties: Sequence[Actors], trials: int, nodes: Sequence[Node]) -> Iterator[str]:
    needed, there = trials * _hosts(parties), _memory(nodes)
    if there is not None and needed > CLOSE * there:
        yield (
            f"about {_gib(needed)} of {_gib(there)} of memory: lower runtime.client_actors, "
            "client.batch_size or evaluation.batch_size"
        )


def _memory_faults(parties: Sequence[Actors], nodes: Sequence[Node]) -> Iterator[str]:
    there = _memory(nodes)
    if there is None:
        return
    largest = max(node.memory or 0 for node in nodes)
    for actors in parties:
        certain = actors.peak.footprint.host_certain
        if certain > largest:
            yield (
                f"the {actors.role} needs {_gib(certain)} of memory for its process, weights and "
                f"what it trains alone; the largest node has {_gib(largest)}. Use a smaller model "
                "or a larger node"
            )
    together = sum(actors.count * _unshared(actors) for actors in parties)
    if together > there:
        yield (
            f"the run needs {_gib(together)} of memory for its processes, weights and what they "
            f"train alone; the cluster has {_gib(there)}. Lower runtime.client_actors or use a "
            "larger cluster"
        )


def _unshared(actors: Actors) -> int:
    footprint = actors.peak.footprint
    return footprint.host_certain - footprint.loading


def _cap(actors: Actors, card: int) -> float:
    """Bytes of a card that an actor may have: its share, or all that CUDA leaves."""
    return min(actors.gpus * card, card - CUDA_CONTEXT)


def _card_faults(actors: Actors, card: int | None) -> Iterator[str]:
    if not actors.gpus or card is None:
        return
    certain, cap = actors.peak.footprint.certain, _cap(actors, card)
    if certain > cap:
        yield (
            f"the {actors.role} needs {_gib(certain)} of GPU memory for its weights and what it "
            f"trains alone; runtime.{actors.role}_gpus = {actors.gpus:g} of {_gib(card)} is "
            f"{_gib(cap)}. Raise it, or lower client.base_bits"
        )


def _card_notes(actors: Actors, card: int | None) -> Iterator[str]:
    """Whether a share of a GPU is too small or larger than need be."""
    if not actors.gpus:
        return
    key = f"runtime.{actors.role}_gpus"
    if card is None:
        yield f"whether {key} = {actors.gpus:g} is enough is unknown, as is the GPU's memory"
        return
    if actors.peak.size > CLOSE * _cap(actors, card):
        yield (
            f"about {_gib(actors.peak.size)} of the {_gib(_cap(actors, card))} that {key} = "
            f"{actors.gpus:g} allows: raise it, or lower client.batch_size or client.base_bits"
        )
        return
    fit = int(card // (actors.peak.size / CLOSE + CUDA_CONTEXT))
    if actors.role == "client" and fit > 1 / actors.gpus + 1e-6:
        yield (
            f"{fit} of {_gib(actors.peak.size)} fit on a card of {_gib(card)}: {key} could be "
            f"{int(1000 / fit) / 1000:g}"
        )


def _hosts(parties: Sequence[Actors]) -> int:
    """Bytes of all nodes' memory that one run needs."""
    return sum(actors.count * actors.peak.host for actors in parties)


def _memory(nodes: Sequence[Node]) -> int | None:
    """Bytes of all nodes, or None where one's are unknown."""
    known = [node.memory for node in nodes if node.memory is not None]
    return sum(known) if len(known) == len(nodes) else None


def _card(nodes: Sequence[Node]) -> int | None:
    """Bytes of the smallest GPU, or None where one is unknown or there is none."""
    cards = [node.card for node in nodes if node.gpus]
    known = [card for card in cards if card is not None]
    return min(known) if known and len(known) == len(cards) else None


def _cores(nodes: Sequence[Node]) -> float:
    return sum(node.cpus for node in nodes)


def _nodes_words(nodes: Sequence[Node]) -> str:
    memory, gpus, card = _memory(nodes), sum(node.gpus for node in nodes), _card(nodes)
    parts = [_count(_cores(nodes), "CPU"), _gib(memory) if memory else "memory unknown"]
    if gpus:
        parts.append(_count(gpus, "GPU") + (f" of {_gib(card)}" if card else ", memory unknown"))
    return f"{_count(len(nodes), 'node')}: {', '.join(parts if gpus else [*parts, 'no GPU'])}"


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
