"""What a run will take of the cluster, said before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.peaks import expected_peak
from fedlpp_ray.runtime.capacity import (
    Actors,
    all_cores,
    all_memory,
    card_faults,
    card_notes,
    counted,
    in_gib,
    memory_faults,
    memory_notes,
    smallest_card,
)
from fedlpp_ray.runtime.nodes import Node, cluster_nodes
from fedlpp_ray.runtime.placement import PlacementError, bundles, check_fits, client_actors


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
        cores = counted(all_cores(self.nodes), "core")
        rest = "; the server rests while clients train" if self.clients.count else ""
        trials = f"{counted(self.trials, 'trial')} side by side, " if self.trials > 1 else ""
        busy = _busy(self.server.count, self.clients.count, self.threads, self.trials)
        found.append(f"  load    {trials}{counted(busy, 'thread')} at a time on {cores}{rest}")
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
    ranks = experiment.server.num_workers
    server = Actors("server", ranks, runtime.server_cpus, runtime.server_gpus, expected)
    count = client_actors(experiment) * experiment.client.num_workers if federated else 0
    peak = expected_peak(experiment, "client") if federated else expected
    clients = Actors("client", count, runtime.client_cpus, runtime.client_gpus, peak)
    trials = max(1, min(most_trials, _room(experiment, nodes)))
    parties = [server, clients] if federated else [server]
    notes = [
        *_crowding(_busy(ranks, count, runtime.threads, trials), count, trials, nodes),
        *memory_notes(parties, trials, nodes),
        *(note for actors in parties for note in card_notes(actors, smallest_card(nodes))),
    ]
    faults = [
        *(fault for actors in parties for fault in card_faults(actors, smallest_card(nodes))),
        *memory_faults(parties, nodes),
    ]
    return Plan(tuple(nodes), server, clients, runtime.threads, trials, tuple(notes), tuple(faults))


def show_plan(experiment: Experiment, console: Console, *, most_trials: int = 1) -> None:
    """Print the plan for the connected cluster, and refuse what cannot work there.

    Raises:
        PlacementError: as `check_fits` for one run, and as `Plan.check`.
    """
    check_fits(bundles(experiment), experiment.server.num_workers)
    made = plan(experiment, cluster_nodes(experiment), most_trials=most_trials)
    for line in made.lines():
        console.print(line, highlight=False, markup=False)
    made.check()


def _room(experiment: Experiment, nodes: Sequence[Node]) -> int:
    """Runs for which the cluster has CPUs and GPUs at a time, if it can be cut at will."""
    needed = bundles(experiment)
    cpus = sum(bundle["CPU"] for bundle in needed)
    gpus = sum(bundle.get("GPU", 0) for bundle in needed)
    room = (all_cores(nodes) + 1e-6) // cpus
    return int(min(room, (sum(node.gpus for node in nodes) + 1e-6) // gpus) if gpus else room)


def _busy(servers: int, clients: int, threads: int, trials: int) -> int:
    """Threads that compute at a time. The server rests while clients train; to evaluate, it and
    one client compute."""
    return trials * max(clients, servers + bool(clients)) * threads


def _crowding(busy: int, clients: int, trials: int, nodes: Sequence[Node]) -> Iterator[str]:
    cores = all_cores(nodes)
    if busy > cores:
        keys = "runtime.threads or runtime.client_actors" if clients else "runtime.threads"
        sweep = ", or tune_config.max_concurrent_trials" if trials > 1 else ""
        yield (
            f"{counted(busy, 'thread')} would take turns on {counted(cores, 'core')}: lower "
            f"{keys}{sweep}"
        )


def _nodes_words(nodes: Sequence[Node]) -> str:
    memory, gpus, card = all_memory(nodes), sum(node.gpus for node in nodes), smallest_card(nodes)
    parts = [counted(all_cores(nodes), "CPU"), in_gib(memory) if memory else "memory unknown"]
    if gpus:
        parts.append(counted(gpus, "GPU") + (f" of {in_gib(card)}" if card else ", memory unknown"))
    return f"{counted(len(nodes), 'node')}: {', '.join(parts if gpus else [*parts, 'no GPU'])}"
