"""The attack ladder on a finished run: `python -m fedlpp_ray.attack results/trec_minilm-1a2b`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedlpp_ray.command_line import WIDTH, check_writable_file, run_command
from fedlpp_ray.config import Experiment, check_same, check_same_adversary, parse_overrides
from fedlpp_ray.errors import UserError
from fedlpp_ray.privacy import Interval
from fedlpp_ray.storage import CheckpointError, RunFolder, write_file
from fedlpp_ray.storage.runs import LEAK_CURVE, RESULT, read_result, read_round

UTILITY = "utility"
"""As in `fedlpp_ray.tasks`, whose import takes seconds."""

if TYPE_CHECKING:
    from fedlpp_ray.privacy.attacks import Known
    from fedlpp_ray.tracking.run_log import RunLog

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
    outcomes = [read_result(run) for run in runs]
    found = [_experiment(x, overrides, run) for x, run in zip(outcomes, runs, strict=True)]
    for run, experiment in zip(runs[1:], found[1:], strict=True):
        check_same(experiment.with_values({"seed": found[0].seed}), found[0], str(run))
        check_same_adversary(experiment, found[0], str(run))
    seeds = [experiment.seed for experiment in found]
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
    asked = [_asked(options, *x) for x in zip(runs, found, outcomes, targets, strict=True)]
    reports = [_attack_run(each, options.curve, console) for each in asked]
    if several:
        from fedlpp_ray.federation.intervals import over_seeds
        from fedlpp_ray.federation.results import to_json

        means = over_seeds(dict(zip(seeds, reports, strict=True)))
        write_file(summary, (to_json(means) + "\n").encode())
        Console(highlight=False, width=WIDTH).print(_seeds_table(means))
        console.print(f"seeds     {summary}")
    return 0


@dataclass(frozen=True)
class _Asked:
    """A run to be attacked, with all that could stand in the way known.

    Attributes:
        folder: Of the run.
        experiment: What was run, and by whom it is attacked.
        outcome: The run's result.
        target: Where the report goes.
        attacks: By name.
        left_out: What the adversary cannot make, and why.
        adapter: The server's final one; empty where there is none.
        lacking: Why there is none.
        log: The run in MLflow, if it is asked for.
    """

    folder: RunFolder
    experiment: Experiment
    outcome: dict[str, Any]
    target: Path
    attacks: dict[str, Known]
    left_out: dict[str, str]
    adapter: dict[str, bytes]
    lacking: str
    log: RunLog | None


def _asked(
    options: argparse.Namespace,
    run: Path,
    experiment: Experiment,
    outcome: dict[str, Any],
    target: Path,
) -> _Asked:
    """What is asked for of a run, or why it cannot be had, before anything is computed.

    Raises:
        UserError: a broadcast, an attack or the tracking store cannot be used.
    """
    # These take seconds to import; a wrong configuration is refused before.
    from fedlpp_ray.federation.ladder import check_adversary

    check_adversary(experiment)
    attacks, left_out = _feasible(options.attacks, experiment)
    if options.curve and all(each.level != "broadcast" for each in attacks.values()):
        raise UserError("--curve: none of these attacks only reads broadcasts")
    folder = RunFolder(run, experiment)
    if not folder.kept():
        raise UserError(
            f"{run} has no broadcasts: it is of an earlier version or of a sweep, or no federation"
        )
    adapter, lacking = _adapter(folder, outcome)
    log = None
    if options.tracking_uri:
        from fedlpp_ray.tracking.run_log import RunLog

        log = RunLog(options.tracking_uri, experiment, folder)
    return _Asked(folder, experiment, outcome, target, attacks, left_out, adapter, lacking, log)


def _adapter(folder: RunFolder, outcome: dict[str, Any]) -> tuple[dict[str, bytes], str]:
    """The adapter that the server ended with; else none, and why: it costs intervals alone."""
    from fedlpp_ray.federation.checkpoint import trained
    from fedlpp_ray.federation.results import last_server

    lacking = "the server has no model"
    if last_server(outcome) is None:
        return {}, lacking
    try:
        latest = folder.latest()
        if latest and read_round(latest) < len(outcome["history"]):
            return {}, f"{folder.path}: the last round's checkpoint is not whole"
        return trained(folder), lacking
    except CheckpointError as error:
        return {}, str(error)


def _attack_run(asked: _Asked, curve: int | None, console: Console) -> dict[str, Any]:
    """Attack one run, and write what came of it."""
    from fedlpp_ray.federation.intervals import protection_intervals
    from fedlpp_ray.federation.ladder import Ladder
    from fedlpp_ray.federation.records import RoundRecord
    from fedlpp_ray.federation.results import attack_report, to_json, utility_of
    from fedlpp_ray.tracking.leak import save_leak_curve

    experiment, outcome, target = asked.experiment, asked.outcome, asked.target
    history = [RoundRecord.from_dict(record) for record in outcome["history"]]
    console.print(f"{asked.folder.path}: preparing ...")
    ladder = Ladder(experiment, asked.folder.kept(), history)
    console.print(ladder.threat)
    if asked.left_out:
        console.print(_left_out(asked.left_out))
    outcomes = []
    for each in ladder.run(asked.attacks):
        outcomes.append(each)
        console.print(f"{each.name:<28} {each.utility:.3f}")
    console.print("measuring the server and the floor ...")
    own = ladder.scored_floor()
    utilities = {name: utility_of(metrics) for name, (metrics, _) in own.items()}
    report = attack_report(experiment, outcome, outcomes, utilities)
    report |= {"threat": ladder.threat, "left_out": asked.left_out}
    found = protection_intervals(
        ladder, outcomes, own, asked.adapter, experiment.seed, lacking=asked.lacking
    )
    _add_intervals(report, *found)
    files = [target]
    if curve:
        report["leak_curve"] = [
            {"name": each.name, "round": each.round, UTILITY: each.utility}
            for each in ladder.curve(asked.attacks, curve)
        ]
        files.append(target.with_name(LEAK_CURVE))
        save_leak_curve(report, history, experiment.utility, files[-1])
    write_file(target, (to_json(report) + "\n").encode())
    if asked.log:
        asked.log.attacked(report, files)
    Console(highlight=False, width=WIDTH).print(_table(report))
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
    columns = ("", "utility", "protection", "95 % interval", "protection by seed")
    title = f"{found['threat']}\nmeans over seeds {seeds}"
    shown = Table(*columns, box=None, title=title, title_justify="left")
    utilities = found["utilities"]
    for name, each in found["protection"].items():
        values = " ".join(map(_shown, each["values"]))
        mean = _shown_utility(utilities[name]["mean"])
        shown.add_row(name, mean, _shown(each["mean"]), _ends(each), values)
    shown.add_section()
    for name in ("server", "floor"):
        shown.add_row(name, _shown_utility(utilities[name]["mean"]))
    return shown


def _ends(interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return "none"
    return f"{interval['low']:+.3f} to {interval['high']:+.3f}"


def _shown(protection: float | None) -> str:
    return "undefined" if protection is None else f"{protection:+.3f}"


def _shown_utility(utility: float | None) -> str:
    return "none" if utility is None else f"{utility:.3f}"


if __name__ == "__main__":
    sys.exit(main())
