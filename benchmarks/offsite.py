"""The five-way table of offsite-tuning (arXiv 2302.04870) for one experiment with an emulator.

    python -m benchmarks.offsite [CONFIG] [key=value ...]

Two runs, in this process: the federation, and the same adapter trained on all clients' examples
together on the server's own model (`method: centralised`). `zero-shot` of a classifier is that of a
new head, so it is chance.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fedlpp_ray.config import ConfigError, Experiment, load_experiment
from fedlpp_ray.federation import Evaluation, Federation, preflight
from fedlpp_ray.federation.backend import Backend
from fedlpp_ray.federation.in_process import in_process
from fedlpp_ray.tasks import UTILITY, Metrics

DEFAULT = Path(__file__).parents[1] / "configs" / "methods" / "offsite_tuning.yaml"


def measure(experiment: Experiment) -> dict[str, float]:
    """The utility of each row, in the order of the paper's table.

    zero-shot: the server's model, nothing trained. emulator: a client's, nothing trained.
    fine-tune: the adapter trained in the server's model. emulator fine-tuned: the federation's
    adapter in the emulator, as a client receives it. plug-in: the same in the server's model.

    Raises:
        ConfigError: the experiment has no emulator, or keys do not go together.
    """
    if experiment.emulator.kind == "none":
        raise ConfigError("emulator.kind 'none' makes no such table; allowed: shared-layer, ...")
    once = experiment.with_values({"evaluation.every": experiment.federation.rounds})
    federated = once.with_values({"method": "federated"})
    centralised = once.with_values({"method": "centralised"})
    preflight.check([federated, centralised])
    clients, server = in_process(federated), in_process(centralised)
    untrained = server.evaluate(
        0, {}, None, {}
    )().evaluation  # a floor is a client's: of the emulator
    ours, whole = _run(federated, clients), _run(centralised, server)
    rows = {
        "zero-shot": untrained.server if untrained else None,
        "emulator": clients.measure_floor().base,
        "fine-tune": whole.server,
        "emulator fine-tuned": ours.client_before,
        "plug-in": ours.server,
    }
    return {name: _utility(metrics) for name, metrics in rows.items()}


def _run(experiment: Experiment, backend: Backend) -> Evaluation:
    """The last round's evaluation."""
    *_, last = Federation(experiment, backend).run()
    assert last.evaluation is not None  # the last round's always is
    return last.evaluation


def _utility(metrics: Metrics | None) -> float:
    return float("nan") if metrics is None else metrics[UTILITY]


def markdown(rows: dict[str, float]) -> str:
    """The rows of `measure` as a table."""
    lines = [f"| {name} | {value:.3f} |" for name, value in rows.items()]
    return "\n".join(["| model | utility |", "| --- | --- |", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.offsite")
    parser.add_argument("config", nargs="?", default=str(DEFAULT))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(markdown(measure(load_experiment(options.config, options.overrides))))


if __name__ == "__main__":
    main()
