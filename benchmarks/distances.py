"""How near an adversary comes to the server's adapter in a run: its weights, not its answers.

    python -m benchmarks.distances RUN [adversary.key=value ...] [--attacks NAME,...]

A row is an attack, by default each that only reads broadcasts, but for means at a higher rank. Its
distance is ||attack - S|| / ||S|| over every tensor that is sent, and of the products B A of all
layers, which no gauge changes. S is the server's state after the last round, or its final model
where the run ends with one. For adversaries that know the architecture.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from rich.console import Console

from benchmarks import page
from fedlpp_ray.aggregation.products import combine, product
from fedlpp_ray.command_line import run_command
from fedlpp_ray.config import ConfigError, Experiment, parse_overrides
from fedlpp_ray.federation.checkpoint import trained
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.federation.means import attacks_of
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.state import State, layers_of
from fedlpp_ray.storage import RunFolder
from fedlpp_ray.storage.runs import RESULT, read_result

COLUMNS = ["attack", "weights", "products"]


def measure(
    run: Path, overrides: Sequence[str], names: list[str] | None = None
) -> dict[str, tuple[float, float]]:
    """The two distances of each attack, the nearest in weights first.

    Raises:
        UserError: the run cannot be read, there is no such attack, or its adversary cannot make it
            or does not know the architecture.
    """
    outcome = read_result(run)
    experiment = Experiment.from_dict(outcome["config"], str(run / RESULT))
    experiment = experiment.with_values(parse_overrides(overrides))
    if experiment.adversary.architecture != "known":
        raise ConfigError(
            f"adversary.architecture '{experiment.adversary.architecture}' numbers the tensors, "
            "and distances are by name; allowed: known"
        )
    folder = RunFolder(run, experiment)
    history = [RoundRecord.from_dict(record) for record in outcome["history"]]
    view = Ladder(experiment, folder.kept(), history).view
    server = safetensors.torch.load(trained(folder)["adapter_model.safetensors"])
    server = {name: server[name] for name in view.last.state}
    found = {}
    for name, known in attacks_of(experiment, names)[0].items():
        if names or known.level == "broadcast":
            state = known.attack(view)
            if state.keys() > server.keys():  # a mean at a higher rank is no adapter of S's shape
                continue
            found[name] = (of_weights(state, server), of_products(state, server))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def of_weights(state: State, server: State) -> float:
    """||state - server|| / ||server|| over the tensors of the server's."""
    off = sum(float((state[n].double() - t.double()).square().sum()) for n, t in server.items())
    return math.sqrt(off / sum(float(t.double().square().sum()) for t in server.values()))


def of_products(state: State, server: State) -> float:
    """The same of the products of all layers."""
    off = norm = 0.0
    for layer in layers_of(server):
        own = product(server, layer)
        apart = combine([product(state, layer), own], [1.0, -1.0])
        off += float((apart.left @ apart.right).square().sum())
        norm += float((own.left @ own.right).square().sum())
    return math.sqrt(off / norm)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distances",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("overrides", nargs="*", metavar="adversary.key=value")
    parser.add_argument("--attacks", metavar="NAME,...", help="these, whatever their level")
    options = parser.parse_intermixed_args(arguments)
    names = options.attacks.split(",") if options.attacks else None
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    return run_command(lambda: _print(options.run, options.overrides, names), console)


def _print(run: Path, overrides: Sequence[str], names: list[str] | None) -> int:
    found = measure(run, overrides, names)
    cells = [[name, *(f"{distance:.3f}" for distance in pair)] for name, pair in found.items()]
    print(page.rows(COLUMNS, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
