"""The leak curve: how good a model the broadcasts so far give away, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.tasks import UTILITY


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    measured = [(r.round, r.evaluation.server) for r in history if r.evaluation]
    points = [(round, found[UTILITY]) for round, found in measured if found]
    if points:
        axes.plot(*zip(*points, strict=True), color="C0", marker="o", ms=3, label="server")
    curve = report["leak_curve"]
    rounds, values = ([each[key] for each in curve] for key in ("round", UTILITY))
    axes.plot(rounds, values, color="C3", marker="x", label="strongest attack on broadcasts")
    axes.axhline(report["protection"]["floor"][1], color="0.5", ls=":", label="floor")
    axes.set(xlabel="round", ylabel=f"held-out {utility}")
    axes.set_title(fill(f"Leak to {report['threat']}", 90), fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
