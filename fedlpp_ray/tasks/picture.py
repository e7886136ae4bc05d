"""How labels lie at the clients, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedlpp_ray.config import Experiment
from fedlpp_ray.tasks.partition import Partition, partition
from fedlpp_ray.tasks.registry import load_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS = 100
"""At most so many are drawn."""
TICKS = 25
"""At most so many clients and labels are named."""


def label_picture(labels: Sequence[int], shares: Partition, names: Sequence[str]) -> Figure:
    """A column a client: above, its number of examples; below, each label's share of them.

    Of more than 100 clients, 100 are drawn at even distances, the first and the last among them.

    Args:
        labels: The training labels, one an example.
        shares: Whose each example is.
        names: Of the labels, by number.
    """
    from matplotlib.figure import Figure  # as in report.py: only who draws imports it

    total = len(shares)
    clients = np.linspace(0, total - 1, min(total, CLIENTS)).round().astype(np.int64).tolist()
    counts = np.array(
        [
            np.bincount([labels[i] for i in shares.indices(client)], minlength=len(names))
            for client in clients
        ]
    )
    sizes = counts.sum(1)
    figure = Figure(figsize=(10, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1, 3))
    places = range(len(clients))
    above.bar(places, sizes, width=1, color="0.5", edgecolor="white", linewidth=0.5)
    above.set(ylabel="examples", title=f"{len(clients):,} of {total:,} clients")
    image = below.imshow(
        (counts / sizes[:, None]).T, aspect="auto", vmin=0, cmap="viridis", interpolation="none"
    )
    every = -(-len(clients) // TICKS)
    below.set_xticks(places[::every], clients[::every], rotation=0 if total <= 1000 else 45)
    every = -(-len(names) // TICKS)
    below.set_yticks(range(0, len(names), every), names[::every])
    below.set_xlabel("client")
    figure.colorbar(image, ax=below, label="share of the client's examples")
    return figure


def experiment_picture(experiment: Experiment) -> Figure:
    """`label_picture` of an experiment's own text and partition.

    Raises:
        TaskError, AssetError: the data cannot be used.
    """
    task = load_task(experiment.task)
    train = task.train
    shares = partition(train.labels, experiment.federation, experiment.seed, train.keys)
    return label_picture(train.labels, shares, task.labels)
