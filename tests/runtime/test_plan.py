"""The plan of a run: what it says of a cluster, and what it refuses. No Ray is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import peaks
from fedlpp_ray.federation.footprint import estimate
from fedlpp_ray.federation.peaks import Peak, remember_peaks
from fedlpp_ray.runtime import PlacementError
from fedlpp_ray.runtime.capacity import CLOSE, Actors, memory_faults, memory_notes
from fedlpp_ray.runtime.nodes import GIB, Node, node_of
from fedlpp_ray.runtime.plan import plan

NODE = Node(cpus=4, memory=16 * GIB)
CARDS = Node(cpus=64, memory=256 * GIB, gpus=2, card=80 * GIB)
SHARES = {"runtime.client_gpus": 0.5, "runtime.client_actors": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "cache_folder", lambda: tmp_path)


def test_the_lines_say_where_how_much_and_why(tiny_experiment: Experiment) -> None:
    remember_peaks(tiny_experiment, {"client": 900 << 20})
    place, server, clients, load = plan(tiny_experiment, [NODE]).lines()
    assert place == "placement 1 node: 4 CPUs, 16.0 GiB, no GPU"
    assert server.startswith("  server  0.5 CPU, 1 thread, about 0.5 GiB (estimated: process 512 ")
    said = "  clients 2 x 0.5 CPU, 1 thread, about 0.9 GiB each (measured in an earlier run)"
    assert clients == said
    assert load == "  load    2 threads at a time on 4 cores; the server rests while clients train"


def test_a_run_that_is_no_federation_has_no_clients(tiny_experiment: Experiment) -> None:
    made = plan(tiny_experiment.with_values({"method": "centralised"}), [NODE])
    assert [line.split()[0] for line in made.lines()] == ["placement", "server", "load"]
    assert made.lines()[-1].endswith("1 thread at a time on 4 cores")


def test_threads_that_would_take_turns_are_said(tiny_experiment: Experiment) -> None:
    values = {"runtime.threads": 3, "runtime.client_actors": 2}
    (note,) = plan(tiny_experiment.with_values(values), [NODE]).notes
    said = "6 threads would take turns on 4 cores: lower runtime.threads or runtime.client_actors"
    assert note == said
    assert plan(tiny_experiment.with_values(values), [NODE, NODE]).notes == ()


def test_trials_side_by_side_are_counted(tiny_experiment: Experiment) -> None:
    made = plan(tiny_experiment, [NODE], most_trials=9)  # 1.5 CPUs each
    assert made.trials == 2
    assert "2 trials side by side, 4 threads at a time on 4 cores" in made.lines()[3]
    assert plan(tiny_experiment, [NODE], most_trials=1).trials == 1
    small = tiny_experiment.with_values({"runtime.client_cpus": 0.1, "runtime.server_cpus": 0.1})
    crowded = plan(small, [NODE], most_trials=9)
    assert crowded.trials == 9
    assert "tune_config.max_concurrent_trials" in crowded.notes[0]


def test_memory_that_is_close_is_noted_and_too_little_refused(tiny_experiment: Experiment) -> None:
    close = plan(tiny_experiment, [Node(4, memory=1600 << 20)])
    assert any("of 1.6 GiB of memory: lower runtime.client_actors" in n for n in close.notes)
    close.check()
    with pytest.raises(PlacementError, match=r"the run needs 1\.5 GiB .* the cluster has 1\.2 GiB"):
        plan(tiny_experiment, [Node(4, memory=1200 << 20)]).check()
    with pytest.raises(PlacementError, match=r"the server needs 0\.5 GiB of memory .* largest"):
        plan(tiny_experiment, [Node(4, memory=400 << 20)] * 9).check()
    unknown = plan(tiny_experiment, [Node(4)])
    unknown.check()
    assert "memory unknown" in unknown.lines()[0]


def test_what_is_mapped_counts_once(tiny_experiment: Experiment) -> None:
    mapped = replace(estimate(tiny_experiment, "client"), loading=GIB, shared=GIB)
    clients = Actors("client", 4, cpus=1, gpus=0, peak=Peak(mapped.peak, False, mapped))
    private = 4 * (mapped.certain - 2 * GIB)
    assert not list(memory_faults([clients], [Node(4, private + 2 * GIB)]))
    assert list(memory_faults([clients], [Node(4, private + 2 * GIB - 1)]))
    enough = int((4 * (mapped.peak - 2 * GIB) + 2 * GIB) / CLOSE) + 1
    assert not list(memory_notes([clients], 1, [Node(4, enough)]))
    assert list(memory_notes([clients], 1, [Node(4, enough - 2)]))


def test_how_many_clients_a_card_could_hold_is_said(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values(SHARES)
    remember_peaks(experiment, {"client": 8 * GIB})
    made = plan(experiment, [CARDS])
    assert "128.0" not in made.lines()[0]
    assert made.lines()[0].endswith("2 GPUs of 80.0 GiB")
    assert "0.5 CPU + 0.5 GPU, 1 thread, about 8.0 GiB of the GPU each" in made.lines()[2]
    said = "8 of 8.0 GiB fit on a card of 80.0 GiB: runtime.client_gpus could be 0.125"
    assert made.notes == (said,)


def test_a_share_that_is_too_small_is_noted(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values(SHARES)
    remember_peaks(experiment, {"client": 39 * GIB})
    made = plan(experiment, [CARDS])
    assert made.notes[0].startswith("about 39.0 GiB of the 40.0 GiB that runtime.client_gpus = 0.5")
    made.check()


def test_weights_that_do_not_fit_a_share_are_refused(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"runtime.server_gpus": 1e-6} | SHARES)
    with pytest.raises(PlacementError, match=r"the server needs .* runtime.server_gpus = 1e-06"):
        plan(experiment, [CARDS]).check()


def test_a_card_of_unknown_size_is_said(tiny_experiment: Experiment) -> None:
    made = plan(tiny_experiment.with_values(SHARES), [Node(8, 64 * GIB, gpus=2)])
    assert made.lines()[0].endswith("2 GPUs, memory unknown")
    assert made.notes == (
        "whether runtime.client_gpus = 0.5 is enough is unknown, as is the GPU's memory",
    )


@pytest.mark.parametrize(
    ("resources", "local", "expected"),
    [
        (
            {"CPU": 2.0, "memory": 10.0 * GIB, "object_store_memory": 4.0 * GIB},
            None,
            Node(2, 14 * GIB),
        ),
        ({"CPU": 8.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}, None, Node(8, None, 1, 24 * GIB)),
        # Ray calls cards of 40 and of 80 GiB so.
        ({"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 1.0}, None, Node(8, None, 1, None)),
        ({"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 1.0}, 40, Node(8, None, 1, 40)),
    ],
)
def test_a_node_is_read_from_rays_resources(
    resources: dict[str, float], local: int | None, expected: Node
) -> None:
    assert node_of(resources, local) == expected
