"""The attack ladder on a finished run: `python -m fedlpp_ray.attack results/trec_minilm-1a2b`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedlpp_ray.command_line import check_writable_file, run_command
from fedlpp_ray.config import Experiment, parse_overrides
from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy import measure_protection
from fedlpp_ray.storage import RunFolder, write_file
from fedlpp_ray.storage.runs import RESULT

UTILITY = "utility"
"""As in `fedlpp_ray.tasks`, whose import takes seconds."""

if TYPE_CHECKING:
    from fedlpp_ray.federation.ladder import Ladder, Outcome

ATTACKS_FILE, CURVE_FILE = "attacks.json", "leak_curve.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    return run_command(lambda: _attack(options, console), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedlpp_ray.attack",
        description="How good a model the adversary can make of what a finished run sent to "
        "clients, and what protection is left.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="adversary.key=value",
        help="another threat model, e.g. adversary.colluders=4",
    )
    parser.add_argument("--attacks", metavar="A,B", help="only these; default: all")
    parser.add_argument(
        "--curve",
        type=int,
        metavar="N",
        help=f"also the strongest attack after every N broadcasts, drawn in {CURVE_FILE}",
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="log to the run in MLflow")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help=f"default: {ATTACKS_FILE} in the run's folder"
    )
    return parser


def _attack(options: argparse.Namespace, console: Console) -> int:
    if options.curve is not None and options.curve < 1:
        raise UserError(f"--curve {options.curve}: allowed: 1 and more")
    outcome = _result(options.run)
    experiment = _experiment(outcome, options.overrides, options.run)
    target = options.json or options.run / ATTACKS_FILE
    check_writable_file("--json", target)
    # These take seconds to import; a wrong configuration is refused before.
    from fedlpp_ray.federation.ladder import Ladder, check_adversary
    from fedlpp_ray.federation.records import RoundRecord
    from fedlpp_ray.federation.results import to_json
    from fedlpp_ray.privacy.attacks import find_attacks
    from fedlpp_ray.tracking.leak import save_leak_curve

    check_adversary(experiment)
    attacks = find_attacks(options.attacks.split(",") if options.attacks else None)
    if options.curve and all(each.level != "broadcast" for each in attacks.values()):
        raise UserError("--curve: none of these attacks only reads broadcasts")
    history = [RoundRecord.from_dict(record) for record in outcome["history"]]
    broadcasts = RunFolder(options.run, experiment).kept()
    if not broadcasts:
        raise UserError(
            f"{options.run} has no broadcasts: it is of an earlier version, or no federation"
        )
    console.print(f"{options.run}: preparing ...")
    ladder = Ladder(experiment, broadcasts, history)
    console.print(_threat(experiment, ladder))
    outcomes = []
    for found in ladder.run(attacks):
        outcomes.append(found)
        console.print(f"{found.name:<28} {found.utility:.3f}")
    console.print("floor ...")
    report = _report(experiment, outcome, outcomes, ladder.scored_floor())
    report["threat"] = _threat(experiment, ladder)
    from fedlpp_ray.federation.checkpoint import trained
    from fedlpp_ray.federation.intervals import add_intervals

    adapter = trained(RunFolder(options.run, experiment)) if report["protection"]["server"] else {}
    add_intervals(report, ladder, outcomes, adapter)
    files = [target]
    if options.curve:
        report["leak_curve"] = [
            {"name": each.name, "round": each.round, UTILITY: each.utility}
            for each in ladder.curve(attacks, options.curve)
        ]
        files.append(target.with_name(CURVE_FILE))
        save_leak_curve(report, history, experiment.utility, files[-1])
    write_file(target, (to_json(report) + "\n").encode())
    if options.tracking_uri:
        from fedlpp_ray.tracking.run_log import RunLog

        folder = RunFolder(options.run, experiment)
        RunLog(options.tracking_uri, experiment, folder).attacked(report, files)
    Console(highlight=False).print(_table(report))
    console.print(f"result    {target}")
    return 0


def _result(run: Path) -> dict[str, Any]:
    path = run / RESULT
    if not path.exists():
        raise UserError(
            f"{run} has no {RESULT}: it is no finished run of python -m fedlpp_ray.train"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _experiment(outcome: dict[str, Any], overrides: Sequence[str], run: Path) -> Experiment:
    """What was run, with another threat model where one is asked for."""
    values = parse_overrides(overrides)
    for key in values:
        if not key.startswith("adversary."):
            raise UserError(f"{key}: the run is over; only keys of adversary can be given")
    return Experiment.from_dict(outcome["config"], str(run / RESULT)).with_values(values)


def _threat(experiment: Experiment, ladder: Ladder) -> str:
    """The threat model in words, which belongs beside every number."""
    clients = sorted(ladder.view.tools.clients)
    who = f"client {clients[0]}" if len(clients) == 1 else f"{len(clients)} colluding clients"
    bases = {"client": "their base", "public": "W0 in full precision"}
    bases["corrected"] = "W0 + R, as the server corrects it"
    count, rounds = len(ladder.view.received), experiment.adversary.rounds
    return (
        f"adversary {who}, passive; has {' and '.join(bases[each] for each in ladder.bases)}; "
        f"{count} broadcasts (adversary.rounds '{rounds}')"
    )


def _report(
    experiment: Experiment,
    outcome: dict[str, Any],
    outcomes: Sequence[Outcome],
    own: dict[str, Scored],
) -> dict[str, Any]:
    """The result as plain values: each attack, and protection against it, its level, and all."""
    from fedlpp_ray.federation.results import last_server

    last = last_server(outcome)
    server = None if last is None else _utility(last)
    floor = own | {name: _utility(outcome["floor"][name]) for name in ("base", "local_only")}

    def protection(chosen: Sequence[Outcome]) -> dict[str, Any]:
        return asdict(measure_protection(server, {x.name: x.utility for x in chosen}, floor))

    levels = dict.fromkeys(each.level for each in outcomes)
    return {
        "adversary": experiment.adversary.model_dump(mode="json"),
        "attacks": [
            {"name": each.name, **asdict(each), "protection": protection([each])["value"]}
            for each in outcomes
        ],
        "levels": {
            level: protection([each for each in outcomes if each.level == level])
            for level in levels
        },
        "protection": protection(outcomes),
    }


def _utility(metrics: dict[str, Any]) -> float:
    """NaN, of a model that has diverged, is null in a result."""
    found = metrics[UTILITY]
    return math.nan if found is None else float(found)


def _table(report: dict[str, Any]) -> Table:
    shown = Table("attack", "level", "broadcasts", "utility", "protection", box=None)
    for each in report["attacks"]:
        utility = f"{each['metrics'][UTILITY]:.3f}"
        cells = [each["name"], each["level"], str(each["broadcasts"]), utility]
        shown.add_row(*cells, _shown(each["protection"]))
    total = report["protection"]
    name, utility = total["strongest"]
    shown.add_section()
    shown.add_row(f"strongest: {name}", "", "", f"{utility:.3f}", _shown(total["value"]))
    if total["server"] is not None:
        shown.add_row("server", "", "", f"{total['server']:.3f}", "")
    shown.add_row(f"floor: {total['floor'][0]}", "", "", f"{total['floor'][1]:.3f}", "")
    if total["reason"]:
        shown.caption = f"protection is undefined: {total['reason']}"
    return shown


def _shown(protection: float | None) -> str:
    return "undefined" if protection is None else f"{protection:+.3f}"


if __name__ == "__main__":
    sys.exit(main())
