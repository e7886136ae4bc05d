"""One federated run: `python -m fedlpp_ray.train configs/trec_minilm.yaml lora.rank=4`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedlpp_ray.command_line import (
    StopSignal,
    check_writable_file,
    check_writable_folder,
    run_command,
)
from fedlpp_ray.config import Experiment, fingerprint, load_experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.storage import RunFolder
from fedlpp_ray.storage.runs import LEAK_CURVE, RESULT

if TYPE_CHECKING:
    from fedlpp_ray.federation import Federation
    from fedlpp_ray.federation.attacked import Attacked
    from fedlpp_ray.tracking.run_log import RunLog

DEFAULT = "configs/trec_minilm.yaml"
RESULTS = Path("results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 130 or 143 after Ctrl-C or SIGTERM."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    return run_command(lambda: _train(options, console), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedlpp_ray.train",
        description="One federated LoRA run: rounds of quantized broadcast, local training and "
        "aggregation; then the floor and the protection. Each round leaves a checkpoint.",
    )
    parser.add_argument("config", nargs="?", default=DEFAULT, help=f"YAML; default {DEFAULT}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. lora.rank=4")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for checkpoints and result.json; default results/CONFIG-DIGEST",
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last finished round")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result as JSON")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="save the server's adapter")
    parser.add_argument("--tracking-uri", metavar="URI", help="log to MLflow; default: not at all")
    parser.add_argument("--in-process", action="store_true", help="one process, without Ray")
    return parser


def _train(options: argparse.Namespace, console: Console) -> int:
    experiment = load_experiment(options.config, options.overrides)
    if options.in_process:
        _check_one_process(experiment)
    if options.json:
        check_writable_file("--json", options.json)
    if options.adapter:
        check_writable_folder("--adapter", options.adapter)
    name = f"{Path(options.config).stem}-{fingerprint(experiment)[:8]}"
    folder = RunFolder(options.output or RESULTS / name, experiment)
    check_writable_folder("--output", folder.path)
    if not options.resume:
        folder.check_new()
    with folder.locked(), StopSignal() as stop:
        try:
            _Command(options, experiment, folder, stop, console).finish()
        except KeyboardInterrupt:
            console.print(
                f"stopped; {folder.path} holds {folder.rounds} of {experiment.federation.rounds} "
                "rounds: the same command with --resume goes on"
            )
            return stop.status
    return 0


def _check_one_process(experiment: Experiment) -> None:
    """Refuse parties of several ranks, each of which is a process."""
    server, client = experiment.server, experiment.client
    asked = {
        "server.num_workers": server.num_workers > 1 and server.num_workers,
        "server.zero.stage": server.zero.stage,
        "client.num_workers": client.num_workers > 1 and client.num_workers,
        "client.zero.stage": client.zero.stage,
    }
    for key, value in asked.items():
        if value:
            raise UserError(
                f"{key} = {value} needs a group of processes, and --in-process is one without a "
                f"group: leave it out, or {key}"
            )


@dataclass(frozen=True)
class _Command:
    """What one command was asked for, and where it says so."""

    options: argparse.Namespace
    experiment: Experiment
    folder: RunFolder
    stop: StopSignal
    console: Console

    def finish(self) -> None:
        """Run what is left to run, then show the result."""
        text = self.folder.result()
        previous = None if text else self.folder.latest()
        if self.options.resume:
            self._say_where(previous, finished=text is not None)
        log = self._log()
        with log.open() if log else nullcontext():
            if text is None:
                text = self._run(previous, log)
                self.folder.write_result(text)
            outcome = json.loads(text)
            self._draw(outcome)
            if log:
                log.finish(outcome)
        self._deliver(text, outcome)

    def _log(self) -> RunLog | None:
        if self.options.tracking_uri is None:
            return None
        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        from fedlpp_ray.tracking.run_log import RunLog

        uri = self.options.tracking_uri
        return RunLog(uri, self.experiment, self.folder, self.stop.held)

    def _say_where(self, previous: Path | None, *, finished: bool) -> None:
        where = f"going on after {previous.name}" if previous else "nothing to go on with: starting"
        self.console.print(f"{self.folder.path}: {'finished' if finished else where}")

    def _run(self, previous: Path | None, log: RunLog | None) -> str:
        """The rounds that are left, and the floor; returns the result as a JSON text."""
        self.console.print(f"{self.options.config}: preparing ...")
        if self.options.in_process:  # torch reads it when it is imported
            os.environ.update(self.experiment.runtime.environment)
        # These take seconds to import; a wrong configuration is refused before.
        from fedlpp_ray.federation import Federation, checkpoint, preflight
        from fedlpp_ray.federation.results import result, to_json
        from fedlpp_ray.tracking.progress import show_rounds

        preflight.check([self.experiment])
        total = self.experiment.federation.rounds
        with _server_lost_for_good(), self._backend() as backend:
            federation = Federation(self.experiment, backend, self.folder.keep)
            if previous:
                checkpoint.restore(federation, previous)
            rounds = checkpoint.checkpointed(federation, self.folder)
            for _ in show_rounds(rounds, total, self.console):
                if log:
                    log.rounds(federation.history)
            floor = backend.measure_floor()
            ladder = self._ladder(federation)
            outcome = result(self.experiment, federation.history, floor, federation.final, ladder)
        return to_json(outcome) + "\n"

    def _ladder(self, federation: Federation) -> Attacked | None:
        if self.experiment.adversary.at_end:
            self.console.print("attacking ...")
        return federation.attack(self.folder.kept)

    @contextmanager
    def _backend(self) -> Iterator[Any]:
        if self.options.in_process:
            from fedlpp_ray.federation import in_process as here
            from fedlpp_ray.federation.peaks import in_process_line, remember_peaks
            from fedlpp_ray.training import process_peak

            self.console.print(in_process_line(self.experiment))
            yield here.in_process(self.experiment)
            remember_peaks(self.experiment, {"process": process_peak()})
            return
        from fedlpp_ray.runtime import connect, ray_backend, reserve
        from fedlpp_ray.runtime.plan import show_plan

        with connect(self.experiment.runtime):
            self.stop.listen()  # Ray has put a handler of its own in place
            show_plan(self.experiment, self.console)
            with (
                reserve(self.experiment) as group,
                closing(ray_backend(self.experiment, group)) as backend,
            ):
                yield backend

    def _draw(self, outcome: dict[str, Any]) -> None:
        """The leak curve, if a finished run has one and its folder has none."""
        from fedlpp_ray.tracking.leak import save_watched

        target = self.folder.path / LEAK_CURVE
        if not target.exists():
            save_watched(outcome, self.experiment.utility, target)

    def _deliver(self, text: str, outcome: dict[str, Any]) -> None:
        """Put the parts of a finished run where they were asked for, and show it."""
        from fedlpp_ray.tracking.progress import protection_lines

        if self.options.json:
            self.options.json.write_text(text, encoding="utf-8")
        if self.options.adapter:
            from fedlpp_ray.federation import checkpoint

            checkpoint.write_adapter(checkpoint.trained(self.folder), self.options.adapter)
        for line in protection_lines(outcome):
            self.console.print(line)
        self.console.print(f"result    {self.folder.path / RESULT}")


@contextmanager
def _server_lost_for_good() -> Iterator[None]:
    from fedlpp_ray.federation.backend import ServerLost

    try:
        yield
    except ServerLost as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the server was lost time and again; --resume goes on: {reason}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
