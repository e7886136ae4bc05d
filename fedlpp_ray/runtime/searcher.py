"""What a searcher is told of a trial: what can be compared with others, and nothing else."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.search import Searcher

from fedlpp_ray.tracking.metrics import PROTECTION


class OfFinished(Searcher):
    """Tells a searcher the results of trials that ran to their last round, with all its metrics.

    A trial that a scheduler stopped has the values of an early round: a lower accuracy, but fewer
    bytes, so that it would stand in a Pareto set; and protection is missing before the last round
    and NaN where it is undefined, which leaves the trial running for ever in Optuna's study. Of
    such trials the searcher is told that they have ended without a result. For Optuna they are
    pruned: its TPE takes them for bad ones, its NSGA-II passes them over. A trial that failed is
    told as failed, which both pass over.

    Args:
        searcher: Whoever chooses.
    """

    def __init__(self, searcher: Searcher) -> None:
        super().__init__(searcher.metric, searcher.mode)
        self._searcher = searcher

    def set_search_properties(self, *arguments: Any, **more: Any) -> bool:
        """Pass on what is searched."""
        return bool(self._searcher.set_search_properties(*arguments, **more))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The searcher's choice."""
        chosen: dict[str, Any] | None = self._searcher.suggest(trial_id)
        return chosen

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on a round that was measured."""
        if self._measured(result):
            self._searcher.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass on a result if it is a whole one."""
        whole = result is not None and PROTECTION in result and self._measured(result)
        self._searcher.on_trial_complete(trial_id, result if whole else None, error)

    def save(self, checkpoint_path: str) -> None:
        """Save the searcher: there is nothing else."""
        self._searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Restore the searcher."""
        self._searcher.restore(checkpoint_path)

    def _measured(self, result: dict[str, Any]) -> bool:
        metrics = self._searcher.metric or []
        names = [metrics] if isinstance(metrics, str) else metrics
        return all(math.isfinite(result.get(name, math.nan)) for name in names)
