"""Progress on the terminal: a bar for a person, a line a round for a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedlpp_ray.federation.records import EVALUATED, RoundRecord
from fedlpp_ray.federation.results import leak_of
from fedlpp_ray.tasks import UTILITY


def show_rounds(
    records: Iterable[RoundRecord], total: int, console: Console
) -> Iterator[RoundRecord]:
    """Pass the rounds on while showing them."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=total)
        for record in records:
            progress.update(bar, completed=record.round, description="")
            console.print(round_line(record, total), highlight=False)
            yield record


def round_line(record: RoundRecord, total: int) -> str:
    """One line on one round."""
    sent = sum(transfer.down for transfer in record.ledger)
    received = sum(transfer.up for transfer in record.ledger)
    parts = [f"round {record.round:>{len(str(total))}}/{total}"]
    if record.evaluation is not None:
        measured = {model: getattr(record.evaluation, model) for model in EVALUATED}
        parts += [f"{name} {found[UTILITY]:.3f}" for name, found in measured.items() if found]
    if strongest := leak_of(record):
        parts.append(f"leak {strongest[1]:.3f} ({strongest[0]})")
    parts.append(f"down {sent / 1e3:.0f} kB  up {received / 1e3:.0f} kB")
    faults = Counter(client.fault.kind for client in record.clients if client.fault)
    parts += [f"{count} {kind}" for kind, count in faults.items()]
    parts.append(f"{record.seconds['total']:.1f} s")
    return "  ".join(parts)


def protection_lines(outcome: Mapping[str, Any]) -> list[str]:
    """A finished run in words: the floor, the strongest client, protection, and against whom.

    Results of earlier versions do not say the last.
    """
    floor, protection = outcome["floor"], outcome["protection"]
    strongest, value, server = (protection[key] for key in ("strongest", "value", "server"))
    found = []
    if strongest is not None:
        found.append(f"strongest client model  {_shown(strongest[1])} ({strongest[0]})")
    if server is not None:
        found.append(f"server {server:.3f}{_final_words(outcome)}")
    return [
        f"floor     base {_shown(floor['base'][UTILITY])}  "
        f"local-only {_shown(floor['local_only'][UTILITY])} (client {floor['client']}, "
        f"{floor['examples']} examples)",
        *_attacked_lines(outcome),
        "  ".join(found),
        "protection  "
        + (f"{value:+.3f}" if value is not None else f"undefined: {protection['reason']}"),
        *(f"threat    {words}" for words in [outcome.get("threat")] if words),
    ]


def _attacked_lines(outcome: Mapping[str, Any]) -> list[str]:
    """What it took to watch the leak, and what the ladder came to."""
    seconds, found = outcome.get("seconds") or {}, []
    if seconds and any(record.get("leak") for record in outcome["history"]):
        words = f"{seconds['leak']:.1f} s, {seconds['leak_share']:.1%} of the run's"
        found.append(f"leak      watched in {words}")
    if ladder := outcome.get("ladder"):
        words = f"{ladder['threat']}; {seconds['ladder']:.1f} s"
        if strongest := ladder["protection"]["strongest"]:
            words = f"strongest {strongest[0]} {_shown(strongest[1])}; {words}"
        found.append(f"ladder    {words}")
    return found


def _final_words(outcome: Mapping[str, Any]) -> str:
    """That the server's is a final model, and what the last broadcast was made of."""
    last = outcome["history"][-1]["server"]
    if not outcome.get("final") or last is None:
        return ""
    return f" (final model, never broadcast; after the last round {_shown(last[UTILITY])})"


def _shown(value: float | None) -> str:
    """A utility; in a result that was read back None is one that is not a number."""
    return "nan" if value is None else f"{value:.3f}"
