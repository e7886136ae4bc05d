"""One Tune trial: one federated run inside the trial's own reservation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.util.placement_group import PlacementGroup, get_current_placement_group

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation, checkpoint
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.federation.results import result, to_json
from fedlpp_ray.runtime.backend import ClosingBackend, ray_backend
from fedlpp_ray.runtime.placement import STRATEGY, bundles
from fedlpp_ray.runtime.space import values_of
from fedlpp_ray.tracking.metrics import final_metrics, round_metrics

RESULT = "result.json"


def trial_resources(experiment: Experiment) -> tune.PlacementGroupFactory:
    """The trial's reservation: nothing for the trial function, which only waits, then the run's.

    Tune places the bundles as `fedlpp_ray.runtime.placement` numbers them.
    """
    return tune.PlacementGroupFactory([{}, *bundles(experiment)], strategy=STRATEGY)


def run_trial(config: dict[str, Any], base: Experiment) -> None:
    """Run `base` with the trial's dotted keys; report each round, the last one with protection.

    Each report carries a checkpoint, so that a restarted trial goes on after its last round. One
    report a round, because a scheduler may stop a trial at any: also at the last.
    """
    experiment = base.with_values(values_of(config), "trial")
    with _backend(experiment, get_current_placement_group()) as backend:
        federation = Federation(experiment, backend)
        if previous := tune.get_checkpoint():
            with previous.as_directory() as folder:
                checkpoint.restore(federation, Path(folder))
        for record in finished_rounds(federation):
            metrics, files = round_metrics(federation.history), {}
            if record.round == experiment.federation.rounds:
                outcome = result(experiment, federation.history, backend.measure_floor())
                metrics |= final_metrics(outcome)
                files[RESULT] = to_json(outcome)
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.save(federation, Path(folder))
                for name, text in files.items():
                    (Path(folder) / name).write_text(text, encoding="utf-8")
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


_warm: list[tuple[PlacementGroup, ClosingBackend]] = []
"""The actors of the last trial, if Tune runs the next one in this process and reservation: what
they have imported, and what their node has mapped, serves it too."""


@contextmanager
def _backend(experiment: Experiment, group: PlacementGroup) -> Iterator[ClosingBackend]:
    backend = None
    while _warm:
        known, left = _warm.pop()
        if known == group and left.begin(experiment):
            backend = left
        else:
            left.close()
    backend = backend or ray_backend(experiment, group)
    try:
        yield backend
    finally:
        _warm.append((group, backend))
