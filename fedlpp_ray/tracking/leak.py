"""The leak curve: how good a model the broadcasts so far give away, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.federation.results import leak_of
from fedlpp_ray.federation.threat import threat_of_run
from fedlpp_ray.tasks import UTILITY

Points = Sequence[tuple[int, float]]
"""Utility after rounds."""


def save_watched(outcome: Mapping[str, Any], utility: str, path: Path) -> None:
    """Draw what a run has measured of its leak (`adversary.watch`), if it has.

    Args:
        outcome: Its result.
        utility: Name of the metric that is the utility.
        path: Where the PNG goes.
    """
    history = [RoundRecord.from_dict(record) for record in outcome["history"]]
    leaks = {record.round: found for record in history if (found := leak_of(record))}
    if not leaks:
        return
    curve = [(round, found) for round, (_, found) in leaks.items()]
    threat = threat_of_run(Experiment.from_dict(outcome["config"]))
    floor = outcome["protection"]["floor"]
    _draw(history, curve, floor, threat=threat, utility=utility, path=path)


def save_leak_curve(
    report: Mapping[str, Any], history: Sequence[RoundRecord], utility: str, path: Path
) -> None:
    """Draw the strongest attack's utility over rounds, beside the server's and the floor.

    Args:
        report: Of `fedlpp_ray.attack`, with its `leak_curve`.
        history: The run's rounds.
        utility: Name of the metric that is the utility.
        path: Where the PNG goes.
    """
    curve = [(each["round"], each[UTILITY]) for each in report["leak_curve"]]
    floor = report["protection"]["floor"]
    _draw(history, curve, floor, threat=report["threat"], utility=utility, path=path)


def _draw(
    history: Sequence[RoundRecord],
    curve: Points,
    floor: tuple[str, float | None],
    *,
    threat: str,
    utility: str,
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    measured = [(r.round, r.evaluation.server) for r in history if r.evaluation]
    points = [(round, found[UTILITY]) for round, found in measured if found]
    if points:
        axes.plot(*zip(*points, strict=True), color="C0", marker="o", ms=3, label="server")
    label = "strongest attack on broadcasts"
    axes.plot(*zip(*curve, strict=True), color="C3", marker="x", label=label)
    name, worth = floor
    if worth is not None:
        axes.axhline(worth, color="0.5", ls=":", label=f"floor: {name}")
    axes.set(xlabel="round", ylabel=f"held-out {utility}")
    axes.set_title(fill(f"Leak to {threat}", 90), fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
