"""The server: FedAvg over the adapters of a random cohort, timed round by round."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from benchmarks.flower.app.task import get_model

PARTS = ("data", "model", "arithmetic", "client")


def make_app(config: dict[str, Any], done: Callable[[dict[str, Any]], None]) -> ServerApp:
    """The server of a federation; `done` is given what it measured.

    That is `rounds`, the seconds of each round, and `clients`, for each round the number of clients
    that returned and the mean seconds of their parts.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        ended: list[float] = []

        def note(server_round: int, arrays: ArrayRecord) -> None:
            ended.append(time.perf_counter())

        strategy = FedAvg(
            fraction_train=config["cohort"] / config["clients"],
            min_train_nodes=config["cohort"],
            min_available_nodes=config["clients"],
            fraction_evaluate=0.0,
            train_metrics_aggr_fn=mean_seconds,
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(get_peft_model_state_dict(get_model(config))),
            train_config=ConfigRecord(config),
            num_rounds=config["rounds"],
            evaluate_fn=note,  # called before the first round and after each
        )
        clients = [dict(record) for record in result.train_metrics_clientapp.values()]
        rounds = [b - a for a, b in pairwise(ended)]
        done({"rounds": rounds, "clients": clients})

    return app


def mean_seconds(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    """How many clients returned, and the mean of what their parts took."""
    found = [reply["metrics"] for reply in replies]
    means = {part: sum(metrics[part] for metrics in found) / len(found) for part in PARTS}
    return MetricRecord({"returned": len(found), **means})
