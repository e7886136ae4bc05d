"""A sweep's outcome: table, non-dominated set, CSV and plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from string import ascii_lowercase
from textwrap import fill
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from fedlpp_ray.runtime.sweep import TrialOutcome
from fedlpp_ray.tasks import UTILITY
from fedlpp_ray.tracking.metrics import (
    FINAL_UTILITY,
    PROTECTION,
    ROUND,
    SERVER_UTILITY,
    THREAT,
    short,
)

BEST = "non_dominated"
_LISTED = 6
"""Lines about threat models that a plot's title has room for."""
_COLUMNS = {
    FINAL_UTILITY: "server",
    f"client_before/{UTILITY}": "client before",
    f"client_after/{UTILITY}": "client after",
    "strongest_client": "strongest client",
    "floor": "floor",
    "protection": "protection",
    "bytes/total": "MB moved",
    "seconds/run": "seconds",
}


def summarize(
    outcomes: Iterable[TrialOutcome], keys: Sequence[str], objectives: Mapping[str, str]
) -> pd.DataFrame:
    """One row a trial: searched keys, status, last metrics, against whom, whether non-dominated.

    A trial that failed, was stopped, or lacks an objective (undefined protection is NaN), is never
    non-dominated.
    """
    rows = []
    for outcome in outcomes:
        searched = {key: _plain(outcome.config.get(key)) for key in keys}
        row = {"trial": outcome.trial, **searched, "status": outcome.status, **outcome.metrics}
        rows.append(row | {THREAT: outcome.threat, "error": outcome.error})
    table = pd.DataFrame(rows)
    for metric in {*objectives, *_COLUMNS, SERVER_UTILITY} - set(table):  # no trial has it
        table[metric] = math.nan
    points = table[list(objectives)].astype(float).where(table["status"] == "finished")
    table[BEST] = non_dominated(points.to_numpy(), objectives.values())
    return table


def _plain(value: Any) -> Any:
    """A value that a table can sort and group by."""
    return short(value) if isinstance(value, list | tuple | None) else value


def non_dominated(points: Any, directions: Iterable[str]) -> list[bool]:
    """Which points no other point beats: at least as good in all, better in one.

    Args:
        points: (points, objectives), float; a point with NaN is never non-dominated.
        directions: "max" or "min", one an objective.
    """
    signs = [1.0 if direction == "max" else -1.0 for direction in directions]
    values = [tuple(s * x for s, x in zip(signs, point, strict=True)) for point in points]
    complete = [value for value in values if not any(map(math.isnan, value))]

    def beaten(value: tuple[float, ...]) -> bool:
        return any(
            other != value and all(a >= b for a, b in zip(other, value, strict=True))
            for other in complete
        )

    return [value in complete and not beaten(value) for value in values]


def console_table(table: pd.DataFrame, keys: Sequence[str]) -> Table:
    """The summary for the terminal; a star marks the non-dominated trials.

    Against whom protection is, is said below; where trials differ in that, by a letter in each row.
    """
    letters = _letters(table)
    titles = [key.rpartition(".")[2].replace("_", " ") for key in keys]  # words, to break lines at
    differing = [THREAT] if len(letters) > 1 else []
    shown = Table("", *titles, *_COLUMNS.values(), *differing, box=None)
    shown.caption, shown.caption_justify = Text("\n".join(_legend(letters))), "left"
    shown.columns[1 + len(keys) + list(_COLUMNS).index(PROTECTION)].no_wrap = True
    for _, row in table.iterrows():
        cells = [_cell(column, row.get(column, math.nan)) for column in _COLUMNS]
        if row["status"] != "finished":
            last = row.get(ROUND, math.nan)
            after = "" if math.isnan(last) else f" at {last:.0f}"
            cells[list(_COLUMNS).index(PROTECTION)] = f"{row['status']}{after}"
            cells[list(_COLUMNS).index(FINAL_UTILITY)] = _cell(SERVER_UTILITY, row[SERVER_UTILITY])
        cells += [letters.get(row[THREAT], "") for _ in differing]
        shown.add_row("*" if row[BEST] else "", *[short(row[key]) for key in keys], *cells)
    return shown


def _letters(table: pd.DataFrame) -> dict[str, str]:
    """A letter, or two, for each threat model that protections of the summary are against."""
    found = table[table["status"] == "finished"][THREAT].dropna().unique()
    return {threat: _letter(number) for number, threat in enumerate(found)}


def _letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    high, low = divmod(number, len(ascii_lowercase))
    return (_letter(high - 1) if high else "") + ascii_lowercase[low]


def _legend(letters: Mapping[str, str]) -> list[str]:
    """What the letters stand for, after what all threat models begin with."""
    if len(letters) < 2:
        return [f"threat: {threat}" for threat in letters]
    clauses = [threat.split("; ") for threat in letters]
    alike = takewhile(lambda each: len(set(each)) == 1, zip(*clauses, strict=False))
    shared = [clause for clause, *_ in alike]
    rests = ["; ".join(each[len(shared) :]) or "no more" for each in clauses]
    lines = [
        f"threat {letter}: {rest}" for letter, rest in zip(letters.values(), rests, strict=True)
    ]
    return [f"threat: {'; '.join(shared)}; and", *lines] if shared else lines


def _cell(column: str, value: float) -> str:
    if math.isnan(value):
        return "undefined" if column == "protection" else "-"
    if column == "bytes/total":
        return f"{value / 1e6:.2f}"
    if column == "protection":
        return f"{value:+.3f}"
    return f"{value:.0f}" if column == "seconds/run" else f"{value:.3f}"


def save_plot(table: pd.DataFrame, keys: Sequence[str], utility: str, path: Path) -> None:
    """Server utility and the strongest client's against bytes, trials joined by a line.

    The title says against whom; where trials differ in that, a letter stands at each client.

    Args:
        table: From `summarize`.
        keys: The searched keys; the first one colours the points.
        utility: Name of the metric that is the utility.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    finished, letters = table[table["status"] == "finished"], _letters(table)
    for number, (value, group) in enumerate(finished.groupby(keys[0], sort=False)):
        colour = f"C{number}"
        megabytes = group["bytes/total"] / 1e6
        label = f"{keys[0]} = {value}"
        axes.vlines(megabytes, group["strongest_client"], group[FINAL_UTILITY], colour, lw=1)
        axes.scatter(megabytes, group[FINAL_UTILITY], color=colour, label=label)
        client = axes.scatter(megabytes, group["strongest_client"], color=colour, marker="x")
        client.set_label(None)
        for x, (_, row) in zip(megabytes, group.iterrows(), strict=True):
            if len(letters) > 1 and row[THREAT] in letters:
                place = (x, row["strongest_client"])
                axes.annotate(letters[row[THREAT]], place, (4, -4), textcoords="offset points")
        best = group[group[BEST]]
        axes.scatter(best["bytes/total"] / 1e6, best[FINAL_UTILITY], s=140, fc="none", ec=colour)
    if len(finished):
        axes.axhspan(finished["floor"].min(), finished["floor"].max(), color="0.5", alpha=0.2)
    axes.scatter([], [], color="0.3", marker="x", label="strongest client model")
    axes.scatter([], [], s=140, fc="none", ec="0.3", label="non-dominated")
    axes.plot([], [], color="0.5", alpha=0.2, lw=8, label="floor")
    axes.set(xlabel="MB moved, both directions", ylabel=f"held-out {utility}")
    said = _legend(letters)
    if len(said) > _LISTED:
        said[_LISTED:] = [f"and {len(said) - _LISTED} more: column {THREAT} of the table"]
    title = ["Server (dot) and strongest client (cross): a gap is protection", *said]
    axes.set_title("\n".join(fill(line, 110) for line in title), fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
