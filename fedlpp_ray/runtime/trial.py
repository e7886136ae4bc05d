"""One Tune trial: one federated run inside the trial's own reservation."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import FileSelector
from ray import tune
from ray.util.placement_group import get_current_placement_group

from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, checkpoint
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.federation.results import result, to_json
from fedlpp_ray.runtime.jobs import LostError
from fedlpp_ray.runtime.placement import STRATEGY, PlacementError, bundles
from fedlpp_ray.runtime.variants import Variants
from fedlpp_ray.runtime.warm import warm_backend
from fedlpp_ray.storage import DamagedError
from fedlpp_ray.tracking.metrics import final_metrics, round_metrics, threats

RESULT = "result.json"

logger = logging.getLogger(__name__)


def trial_resources(experiment: Experiment) -> tune.PlacementGroupFactory:
    """The trial's reservation: nothing for the trial function, which only waits, then the run's.

    Tune places the bundles as `fedlpp_ray.runtime.placement` numbers them.
    """
    return tune.PlacementGroupFactory([{}, *bundles(experiment)], strategy=STRATEGY)


def run_trial(config: dict[str, Any], variants: Variants) -> None:
    """Run the experiment of a trial's choices; report each round, the last one with protection and
    in words against whom.

    Each report carries a checkpoint, so that a restarted trial goes on after its last round. One
    report a round, because a scheduler may stop a trial at any: also at the last.
    """
    with _refused_once():
        _run(variants.experiment(config))


def _run(experiment: Experiment) -> None:
    with warm_backend(experiment, get_current_placement_group()) as backend:
        federation = Federation(experiment, backend)
        if previous := tune.get_checkpoint():
            restore_newest(federation, previous)
        for record in finished_rounds(federation):
            metrics: dict[str, Any] = {**round_metrics(federation.history)}
            files = {}
            if record.round == experiment.federation.rounds:
                floor = backend.measure_floor()
                ladder = federation.attack()
                outcome = result(experiment, federation.history, floor, federation.final, ladder)
                metrics |= final_metrics(outcome) | threats(outcome)
                files[RESULT] = to_json(outcome)
            _report(metrics, federation, files)


def restore_newest(federation: Federation, newest: tune.Checkpoint) -> None:
    """Go on from a trial's newest checkpoint, or from one before it where a power cut tore that.

    Raises:
        DamagedError: none of the trial's checkpoints is whole.
        CheckpointError, ConfigError: as `checkpoint.restore`.
    """
    system, trial = newest.filesystem, str(Path(newest.path).parent)
    found = (info.path for info in system.get_file_info(FileSelector(trial)))
    earlier = [p for p in found if p.rpartition("/")[2].startswith("checkpoint_")]
    earlier = sorted(p for p in earlier if p < newest.path)
    for path in [*earlier, newest.path][::-1]:
        try:
            with tune.Checkpoint(path, system).as_directory() as folder:
                checkpoint.restore(federation, Path(folder))
                return
        except DamagedError as error:
            logger.warning("%s; the one before it is used", error)
    raise DamagedError(f"{trial}: none of its checkpoints is whole")


@contextmanager
def _refused_once() -> Iterator[None]:
    """Have what the user must mend end a trial for good.

    Tune starts a failed trial again (`FailureConfig`), which helps where a process was lost. A
    fault in the input would come again: it does at once, before anything is started.
    """
    context = ray.get_runtime_context()
    name = f"refused-{context.get_job_id()}-{context.get_node_id()}"  # in this sweep alone
    mark = Path(tune.get_context().get_trial_dir()) / name
    if mark.exists():
        raise UserError(mark.read_text(encoding="utf-8"))
    try:
        yield
    except (LostError, PlacementError):
        raise  # no fault of the input
    except UserError as error:
        mark.write_text(str(getattr(error, "cause", error)), encoding="utf-8")
        raise


def _report(metrics: dict[str, Any], federation: Federation, files: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(federation, Path(folder))
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
