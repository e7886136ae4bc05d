"""Peak memory of parties in earlier runs, kept to plan the next one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedlpp_ray.assets import cache_folder
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.footprint import Footprint, Role, estimate

_WHOLE = ("method", "model", "task", "generation", "adapter", "lora", "emulator", "server")
_NOT_MEMORY = {"lr", "schedule", "warmup", "round_schedule", "weight_decay", "max_broadcast_norm"}
"""Keys of `client` that memory does not depend on."""


@dataclass(frozen=True)
class Peak:
    """What a party needs at its peak.

    Attributes:
        size: Bytes on the device that computes: of the process, or of a GPU.
        measured: Whether an earlier run has shown it; else it is estimated.
        footprint: The estimate.
    """

    size: int
    measured: bool
    footprint: Footprint

    @property
    def host(self) -> int:
        """Bytes of the node's memory."""
        return self.footprint.host if self.footprint.on_gpu else self.size

    def why(self) -> str:
        """Where the number comes from."""
        if self.measured:
            return "measured in an earlier run"
        return f"estimated: {self.footprint.words()}"


def expected_peak(experiment: Experiment, role: Role) -> Peak:
    """The peak of a party: measured, or else estimated.

    Raises:
        AssetError, LoraError, LayersError: as `estimate`.
    """
    footprint, known = estimate(experiment, role), known_peaks(experiment).get(role)
    return Peak(known or footprint.peak, known is not None, footprint)


def in_process_line(experiment: Experiment) -> str:
    """What a run that is one process will take, in one line.

    Raises:
        AssetError, LoraError, LayersError: as `estimate`.
    """
    peak, threads = expected_peak(experiment, "process"), experiment.runtime.threads
    return (
        f"placement one process, {threads} thread{'' if threads == 1 else 's'}, about "
        f"{peak.size / (1 << 30):.1f} GiB ({peak.why()})"
    )


def known_peaks(experiment: Experiment) -> dict[Role, int]:
    """Bytes at their peaks of the parties of earlier runs that needed as much memory as this one.

    Empty if there was none, or its note cannot be read.
    """
    try:
        noted = json.loads(_note(experiment).read_text(encoding="utf-8"))
        return {role: int(size) for role, size in noted.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember_peaks(experiment: Experiment, peaks: Mapping[Role, int]) -> None:
    """Note the peaks of a run's parties; the largest of several runs is kept.

    Trials do so at the same time: a note is replaced as a whole. Nothing is said where the cache
    folder cannot be written, for the run does not depend on it.

    Args:
        experiment: What was run.
        peaks: Bytes, as `process_peak` returns them; of several clients the largest.
    """
    known, note = known_peaks(experiment), _note(experiment)
    most = known | {role: max(size, known.get(role, 0)) for role, size in peaks.items()}
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        own = note.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(most), encoding="utf-8")
        own.replace(note)
    except OSError:
        return


def _note(experiment: Experiment) -> Path:
    """The file for all experiments that need the same memory with the same libraries."""
    values = experiment.model_dump(mode="json")
    runtime, client = experiment.runtime, values["client"]
    decides = {section: values[section] for section in _WHOLE} | {
        "client": {key: value for key, value in client.items() if key not in _NOT_MEMORY},
        "uplink.error_feedback": experiment.uplink.error_feedback,
        "evaluation.batch_size": experiment.evaluation.batch_size,
        "cohort": experiment.federation.cohort_size,
        "adversary": values["adversary"],
        "attacked": experiment.federation.rounds if experiment.adversary.at_end else None,
        "threads": runtime.threads,
        "gpus": [runtime.server_gpus > 0, runtime.client_gpus > 0],
        "libraries": [version(name) for name in ("torch", "transformers", "peft")],
    }
    text = json.dumps(decides, sort_keys=True)
    return cache_folder() / "peaks" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
