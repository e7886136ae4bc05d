"""What the rounds of both sides come to, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

PARTS = ("arithmetic", "model", "data")


@dataclass(frozen=True)
class Row:
    """One setting with one base of our clients.

    Attributes:
        setting: Its title.
        base: That of our clients.
        target: Ratio of rounds per second that is aimed at.
        workers: Processes that clients run in, on either side.
        cohort: Clients a round.
        flower: Seconds of each of Flower's measured rounds.
        ours: The same of ours.
        arithmetic: Seconds that a client's steps take alone: on Flower's base, and on ours.
    """

    setting: str
    base: str
    target: float
    workers: int
    cohort: int
    flower: Sequence[float]
    ours: Sequence[float]
    arithmetic: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Rounds per second of ours over Flower's, medians of the rounds."""
        return median(self.flower) / median(self.ours)

    @property
    def beyond(self) -> tuple[float, float]:
        """Worker seconds per client beyond arithmetic, of Flower and of ours.

        A round holds every worker, at work or not: idle ones, while the last client trains, count.
        """
        flower, ours = self.arithmetic
        return (self._per_client(self.flower) - flower, self._per_client(self.ours) - ours)

    def _per_client(self, rounds: Sequence[float]) -> float:
        return median(rounds) * self.workers / self.cohort


def markdown(rows: Sequence[Row]) -> str:
    """The comparison; seconds per client are Flower's and ours."""
    lines = [
        "| setting | our base | Flower, s/round | ours, s/round | ratio | target "
        "| arithmetic, s/client | beyond it, s/client |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row.setting, row.base, f"{median(row.flower):.2f}", f"{median(row.ours):.2f}"]
        cells += [f"**{row.ratio:.2f}**", f"{row.target:g}"]
        cells += [f"{a:.3f}, {b:.3f}" for a, b in (row.arithmetic, row.beyond)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def flower_parts(
    rounds: Sequence[float], clients: Sequence[Mapping[str, Any]], workers: int
) -> dict[str, float]:
    """Mean worker seconds per client of Flower, by what they are spent on.

    Args:
        rounds: Seconds of each measured round.
        clients: For each, `returned` and the mean seconds of the client app's parts.
        workers: Processes that clients run in.
    """
    found = {part: mean(client[part] for client in clients) for part in PARTS}
    app = mean(client["client"] for client in clients)
    found["rest of the client app"] = app - sum(found.values())
    held = [workers * r / c["returned"] for r, c in zip(rounds, clients, strict=True)]
    return {**found, "transport, schedule, server": mean(held) - app}


def parts_markdown(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Where Flower's worker seconds go, a row a setting."""
    columns = list(next(iter(parts.values())))
    lines = [f"| Flower, s/client | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for setting, found in parts.items():
        lines.append(f"| {setting} | {' | '.join(f'{found[c]:.3f}' for c in columns)} |")
    return "\n".join(lines)
