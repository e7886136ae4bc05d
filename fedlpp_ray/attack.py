"""The attack ladder on a finished run: `python -m fedlpp_ray.attack results/trec_minilm-1a2b`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedlpp_ray.command_line import check_writable_file, run_command
from fedlpp_ray.config import Experiment, check_same, parse_overrides
from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy import Interval
from fedlpp_ray.storage import RunFolder, write_file
from fedlpp_ray.storage.runs import LEAK_CURVE, RESULT, read_result

UTILITY = "utility"
"""As in `fedlpp_ray.tasks`, whose import takes seconds."""

if TYPE_CHECKING:
    from fedlpp_ray.privacy.attacks import Known

ATTACKS_FILE, SEEDS_FILE = "attacks.json", "attacks_seeds.json"


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
    parser.add_argument(
        "given",
        nargs="+",
        metavar="RUN | adversary.key=value",
        help="folders of the run, and of the same run with other seeds; and another threat model, "
        "e.g. adversary.colluders=4",
    )
    parser.add_argument("--attacks", metavar="A,B", help="only these; default: all")
    parser.add_argument(
        "--curve",
        type=int,
        metavar="N",
        help=f"also the strongest attack after every N broadcasts, drawn in {LEAK_CURVE}",
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="log to the run in MLflow")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help=f"default: {ATTACKS_FILE} in the run's folder"
    )
    return parser


def _attack(options: argparse.Namespace, console: Console) -> int:
    if options.curve is not None and options.curve < 1:
        raise UserError(f"--curve {options.curve}: allowed: 1 and more")
    overrides = [x for x in options.given if "=" in x and not Path(x).exists()]
    runs = [Path(x) for x in options.given if x not in overrides]
    if not runs:
        raise UserError("RUN is missing: the folder of a finished run")
    experiments = [_experiment(read_result(run), overrides, run) for run in runs]
    for run, experiment in zip(runs[1:], experiments[1:], strict=True):
        check_same(experiment.with_values({"seed": experiments[0].seed}), experiments[0], str(run))
    seeds = [experiment.seed for experiment in experiments]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the runs' seeds are {', '.join(map(str, seeds))}: each may be there once")
    several = len(runs) > 1
    summary = options.json or runs[0] / SEEDS_FILE
    targets = (
        [run / ATTACKS_FILE for run in runs]
        if several
        else [options.json or runs[0] / ATTACKS_FILE]
    )
    for target in [*targets, *([summary] if several else [])]:
        check_writable_file("--json", target)
    reports = [
        _attack_run(options, console, *each)
        for each in zip(runs, experiments, targets, strict=True)
    ]
    if several:
        from fedlpp_ray.federation.intervals import over_seeds
        from fedlpp_ray.federation.results import to_json

        found = over_seeds(dict(zip(seeds, reports, strict=True)))
        write_file(summary, (to_json(found) + "\n").encode())
        Console(highlight=False).print(_seeds_table(found))
        console.print(f"seeds     {summary}")
    return 0


def _attack_run(
    options: argparse.Namespace,
    console: Console,
    run: Path,
    experiment: Experiment,
    target: Path,
) -> dict[str, Any]:
    """Attack one run, and write what came of it."""
    outcome = read_result(run)
    # These take seconds to import; a wrong configuration is refused before.
    from fedlpp_ray.federation.checkpoint import trained
    from fedlpp_ray.federation.intervals import protection_intervals
    from fedlpp_ray.federation.ladder import Ladder, check_adversary
    from fedlpp_ray.federation.records import RoundRecord
    from fedlpp_ray.federation.results import attack_report, to_json, utility_of
    from fedlpp_ray.tracking.leak import save_leak_curve

    check_adversary(experiment)
    attacks, left_out = _feasible(options.attacks, experiment)
    if options.curve and all(each.level != "broadcast" for each in attacks.values()):
        raise UserError("--curve: none of these attacks only reads broadcasts")
    history = [RoundRecord.from_dict(record) for record in outcome["history"]]
    broadcasts = RunFolder(run, experiment).kept()
    if not broadcasts:
        raise UserError(f"{run} has no broadcasts: it is of an earlier version, or no federation")
    console.print(f"{run}: preparing ...")
    ladder = Ladder(experiment, broadcasts, history)
    console.print(ladder.threat)
    if left_out:
        console.print(_left_out(left_out))
    outcomes = []
    for each in ladder.run(attacks):
        outcomes.append(each)
        console.print(f"{each.name:<28} {each.utility:.3f}")
    console.print("measuring the server and the floor ...")
    own = ladder.scored_floor()
    utilities = {name: utility_of(metrics) for name, (metrics, _) in own.items()}
    report = attack_report(experiment, outcome, outcomes, utilities)
    report |= {"threat": ladder.threat, "left_out": left_out}
    has_server = report["protection"]["server"] is not None
    adapter = trained(RunFolder(run, experiment)) if has_server else {}
    found = protection_intervals(ladder, outcomes, own, adapter, experiment.seed)
    _add_intervals(report, *found)
    files = [target]
    if options.curve:
        report["leak_curve"] = [
            {"name": each.name, "round": each.round, UTILITY: each.utility}
            for each in ladder.curve(attacks, options.curve)
        ]
        files.append(target.with_name(LEAK_CURVE))
        save_leak_curve(report, history, experiment.utility, files[-1])
    write_file(target, (to_json(report) + "\n").encode())
    if options.tracking_uri:
        from fedlpp_ray.tracking.run_log import RunLog

        folder = RunFolder(run, experiment)
        RunLog(options.tracking_uri, experiment, folder).attacked(report, files)
    Console(highlight=False).print(_table(report))
    console.print(f"result    {target}")
    return report


def _experiment(outcome: dict[str, Any], overrides: Sequence[str], run: Path) -> Experiment:
    """What was run, with another threat model where one is asked for."""
    values = parse_overrides(overrides)
    for key in values:
        if not key.startswith("adversary."):
            raise UserError(f"{key}: the run is over; only keys of adversary can be given")
    return Experiment.from_dict(outcome["config"], str(run / RESULT)).with_values(values)


def _feasible(names: str | None, experiment: Experiment) -> tuple[dict[str, Known], dict[str, str]]:
    """The attacks to make, and why not the others."""
    from fedlpp_ray.federation.means import attacks_of

    try:
        return attacks_of(experiment, names.split(",") if names else None)
    except UserError as error:
        raise UserError(f"--attacks: {error}") from None


def _left_out(reasons: Mapping[str, str]) -> str:
    """The attacks that the adversary cannot make, by what they need."""
    needs = {reason: [n for n, x in reasons.items() if x == reason] for reason in reasons.values()}
    return "left out: " + "; ".join(f"{', '.join(x)} ({reason})" for reason, x in needs.items())


def _add_intervals(
    report: dict[str, Any],
    attacks: Mapping[str, Interval],
    levels: Mapping[str, Interval],
    total: Interval,
) -> None:
    """Each protection's interval over the held-out examples, beside it."""
    for each in report["attacks"]:
        each["interval"] = asdict(attacks[each["name"]])
    for level, interval in levels.items():
        report["levels"][level]["interval"] = asdict(interval)
    report["protection"]["interval"] = asdict(total)


def _table(report: dict[str, Any]) -> Table:
    columns = ("attack", "level", "broadcasts", "utility", "protection", "95 % interval")
    title = report["threat"]
    if report["left_out"]:
        title += f"\n{_left_out(report['left_out'])}"
    shown = Table(*columns, box=None, title=title, title_justify="left")
    for each in report["attacks"]:
        utility = f"{each['metrics'][UTILITY]:.3f}"
        cells = [each["name"], each["level"], str(each["broadcasts"]), utility]
        shown.add_row(*cells, _shown(each["protection"]), _ends(each["interval"]))
    total = report["protection"]
    shown.add_section()
    for level, each in report["levels"].items():
        name, utility = each["strongest"]
        cells = [f"strongest: {name}", level, "", f"{utility:.3f}", _shown(each["value"])]
        shown.add_row(*cells, _ends(each["interval"]))
    name, utility = total["strongest"]
    cells = [f"strongest: {name}", "all", "", f"{utility:.3f}", _shown(total["value"])]
    shown.add_row(*cells, _ends(total["interval"]))
    if total["server"] is not None:
        shown.add_row("server", "", "", f"{total['server']:.3f}", "")
    shown.add_row(f"floor: {total['floor'][0]}", "", "", f"{total['floor'][1]:.3f}", "")
    if total["reason"]:
        shown.caption = f"protection is undefined: {total['reason']}"
    elif total["interval"]["reason"]:
        shown.caption = f"no interval: {total['interval']['reason']}"
    return shown


def _seeds_table(found: dict[str, Any]) -> Table:
    seeds = ", ".join(map(str, found["seeds"]))
    title = f"{found['threat']}; seeds {seeds}"
    shown = Table("protection against", "mean", "95 % interval", "by seed", box=None, title=title)
    for name, each in found["protection"].items():
        values = " ".join(map(_shown, each["values"]))
        shown.add_row(name, _shown(each["mean"]), _ends(each), values)
    return shown


def _ends(interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return "none"
    return f"{interval['low']:+.3f} to {interval['high']:+.3f}"


def _shown(protection: float | None) -> str:
    return "undefined" if protection is None else f"{protection:+.3f}"


if __name__ == "__main__":
    sys.exit(main())
