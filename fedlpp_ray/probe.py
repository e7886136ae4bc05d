"""What the server learns of clients' data in a finished run: `python -m fedlpp_ray.probe RUN`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedlpp_ray.command_line import WIDTH, check_writable_file, run_command
from fedlpp_ray.config import Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.storage import RunFolder, write_file
from fedlpp_ray.storage.runs import RESULT, read_result

if TYPE_CHECKING:
    from fedlpp_ray.federation.probes import Probed

PROBES_FILE = "probes.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    return run_command(lambda: _probe(options, console), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedlpp_ray.probe",
        description="What an honest but curious server learns of clients' texts from the updates "
        "of a finished run, which are made again: membership inference and gradient inversion.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--rounds", metavar="N,N", help="only these; default: the first, middle and last"
    )
    parser.add_argument(
        "--clients", metavar="N,N", help="only these; default: the first eight of each round"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="log to the run in MLflow")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help=f"default: {PROBES_FILE} in the run's folder"
    )
    return parser


def _probe(options: argparse.Namespace, console: Console) -> int:
    run, target = options.run, options.json or options.run / PROBES_FILE
    rounds = _numbers("--rounds", options.rounds)
    clients = _numbers("--clients", options.clients)
    outcome = read_result(run)
    check_writable_file("--json", target)
    experiment = Experiment.from_dict(outcome["config"], str(run / RESULT))
    folder = RunFolder(run, experiment)
    os.environ.update(experiment.runtime.environment)  # torch reads it when it is imported
    # These take seconds to import; a wrong RUN is refused before.
    from fedlpp_ray.federation.probes import Probes, server_view
    from fedlpp_ray.federation.recomputed import all_sent, check_recomputable, choose
    from fedlpp_ray.federation.records import RoundRecord
    from fedlpp_ray.federation.results import to_json

    check_recomputable(experiment)
    history = [RoundRecord.from_dict(record) for record in outcome["history"]]
    chosen = choose(history, rounds, clients)
    broadcasts = folder.kept()
    if not broadcasts:
        raise UserError(f"{run} has no broadcasts: it is of an earlier version, or of a sweep")
    log = None
    if options.tracking_uri:
        from fedlpp_ray.tracking.run_log import RunLog

        log = RunLog(options.tracking_uri, experiment, folder)
    console.print(f"{run}: preparing ...")
    there = [x for x in all_sent(history) if x.round in {each.round for each in chosen}]
    if clients is None and len(there) > len(chosen):
        console.print(f"{len(chosen)} of {len(there)} updates; --clients has others")
    view = server_view(experiment, history[chosen[-1].round - 1])
    console.print(view)
    found = []
    for each in Probes(experiment, broadcasts, history).run(chosen):
        found.append(each)
        console.print(f"round {each.sent.round}, client {each.sent.client}")
    report = {"threat": view, **_report(found, experiment.seed)}
    write_file(target, (to_json(report) + "\n").encode())
    if log:
        log.probed(report, [target])
    shown = Console(highlight=False, width=WIDTH)
    shown.print(_membership_table(report))
    shown.print(_inversion_table(report))
    console.print(_made_again(report))
    console.print(f"result    {target}")
    return 0


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return sorted({int(x) for x in text.split(",")})
    except ValueError:
        raise UserError(f"{option} {text}: allowed: whole numbers, such as 1,6,12") from None


def _report(found: Sequence[Probed], seed: int) -> dict[str, Any]:
    """The result as plain values: each update, then what the clients of a round, and all, say."""
    from fedlpp_ray.federation.probes import pooled

    rounds = dict.fromkeys(each.sent.round for each in found)
    parts: dict[int | None, list[Probed]] = {
        round: [each for each in found if each.sent.round == round] for round in rounds
    }
    parts[None] = list(found)
    return {
        "updates": [
            {
                **{key: getattr(each.sent, key) for key in ("round", "started", "client")},
                "loss": {"recorded": each.sent.loss, "made_again": each.loss, "same": each.same},
                "membership": {name: asdict(x) for name, x in each.membership.items()},
                "inversion": {name: asdict(x) for name, x in each.inversion.items()},
                "refused": dict(each.refused),
            }
            for each in found
        ],
        "pooled": [
            {"round": round, "score": name, **asdict(measured)}
            for round, part in parts.items()
            for name, measured in pooled(part, seed).items()
        ],
    }


def _membership_table(report: dict[str, Any]) -> Table:
    columns = ("round", "client", "score", "members", "others", "AUC", "95 % interval", "TPR")
    title = f"membership inference; {report['threat']}"
    shown = Table(*columns, box=None, title=title, title_justify="left")
    for each in report["updates"]:
        for name, measured in each["membership"].items():
            shown.add_row(str(each["round"]), str(each["client"]), name, *_cells(measured))
    shown.add_section()
    for each in report["pooled"]:
        round = "all" if each["round"] is None else str(each["round"])
        shown.add_row(round, "all", each["score"], *_cells(each))
    lines = ["TPR: at 1 % false positives; none with fewer than 100 different non-members"]
    shown.caption = "\n".join([*lines, *_refusals(report, "membership")])
    shown.caption_justify = "left"
    return shown


def _inversion_table(report: dict[str, Any]) -> Table:
    columns = ("round", "client", "factor", "tokens", "informed", "AUC", "recall", "rank")
    title = f"gradient inversion; {report['threat']}"
    shown = Table(*columns, box=None, title=title, title_justify="left")
    for each in report["updates"]:
        for factor, x in each["inversion"].items():
            values = [f"{x[key]:.3f}" for key in ("informed", "auc", "recall")]
            where = [str(each["round"]), str(each["client"]), factor, str(x["tokens"])]
            shown.add_row(*where, *values, f"{x['rank']} of {x['full_rank']}")
    shown.caption, shown.min_width = "\n".join(_refusals(report, "inversion")), WIDTH
    shown.caption_justify = "left"
    return shown


def _refusals(report: dict[str, Any], probe: str) -> list[str]:
    """Why the probe cannot say anything about updates: each reason, and of which of them."""
    found: dict[tuple[int, str], list[str]] = {}
    for each in report["updates"]:
        if probe in each["refused"]:
            reason = each["round"], each["refused"][probe]
            found.setdefault(reason, []).append(str(each["client"]))
    return [
        f"round {round}, client {', '.join(clients)}: {reason}"
        for (round, reason), clients in found.items()
    ]


def _cells(measured: dict[str, Any]) -> tuple[str, ...]:
    low_high, tpr = measured["interval"], measured["tpr"]
    return (
        str(measured["members"]),
        str(measured["non_members"]),
        f"{measured['auc']:.3f}",
        "none" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}",
        f"{tpr:.3f}" if tpr is not None else "none",
    )


def _made_again(report: dict[str, Any]) -> str:
    """Whether the updates are those of the run, as far as its record tells."""
    total, same = len(report["updates"]), sum(x["loss"]["same"] for x in report["updates"])
    if same == total:
        return f"updates   {total} made again, each with the loss and length that the run recorded"
    return (
        f"updates   {total - same} of {total} made again with another loss or length than the run "
        "recorded (another machine or torch?): they are like those that were sent, not the same"
    )


if __name__ == "__main__":
    sys.exit(main())
