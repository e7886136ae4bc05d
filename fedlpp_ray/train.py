"""One federated run: `python -m fedlpp_ray.train configs/trec_minilm.yaml lora.rank=4`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlpp_ray.command_line import check_writable_file, check_writable_folder, run_command
from fedlpp_ray.config import Experiment, load_experiment

DEFAULT = "configs/trec_minilm.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    return run_command(lambda: _train(options, console), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedlpp_ray.train",
        description="One federated LoRA run: rounds of quantized broadcast, local training and "
        "aggregation; then the floor and the protection.",
    )
    parser.add_argument("config", nargs="?", default=DEFAULT, help=f"YAML; default {DEFAULT}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. lora.rank=4")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result as JSON")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="save the server's adapter")
    parser.add_argument("--in-process", action="store_true", help="one process, without Ray")
    return parser


def _train(options: argparse.Namespace, console: Console) -> int:
    experiment = load_experiment(options.config, options.overrides)
    if options.json:
        check_writable_file("--json", options.json)
    if options.adapter:
        check_writable_folder("--adapter", options.adapter)
    console.print(f"{options.config}: preparing ...", highlight=False)
    if options.in_process:
        os.environ.update(experiment.runtime.environment)  # torch reads it when it is imported
    # These take seconds to import; a wrong configuration is refused before.
    from fedlpp_ray.federation import Federation, checkpoint, preflight
    from fedlpp_ray.federation.results import result, to_json
    from fedlpp_ray.federation.solo import TRAINING
    from fedlpp_ray.tracking.progress import protection_lines, show_rounds

    preflight.check([experiment])
    with _backend(experiment, console, in_process=options.in_process) as backend:
        federation = Federation(experiment, backend)
        for _ in show_rounds(federation.run(), experiment.federation.rounds, console):
            pass
        outcome = result(experiment, federation.history, backend.measure_floor())
        if options.adapter:
            files = {k: v for k, v in backend.adapter().items() if k != TRAINING}
            checkpoint.write_adapter(files, options.adapter)
    if options.json:
        options.json.write_text(to_json(outcome) + "\n", encoding="utf-8")
    for line in protection_lines(outcome):
        console.print(line, highlight=False)
    return 0


@contextmanager
def _backend(experiment: Experiment, console: Console, *, in_process: bool) -> Iterator[Any]:
    if in_process:
        from fedlpp_ray.federation import in_process as here
        from fedlpp_ray.federation.peaks import in_process_line, remember_peaks
        from fedlpp_ray.training import process_peak

        console.print(in_process_line(experiment), highlight=False)
        yield here.in_process(experiment)
        remember_peaks(experiment, {"process": process_peak()})
        return
    from fedlpp_ray.runtime import connect, ray_backend, reserve
    from fedlpp_ray.runtime.plan import show_plan

    with connect(experiment.runtime):
        show_plan(experiment, console)
        with reserve(experiment) as group, closing(ray_backend(experiment, group)) as backend:
            yield backend


if __name__ == "__main__":
    sys.exit(main())
