"""The ceiling, `method: centralised`: a `Solo` on the workers of Ray Train's `TorchTrainer`.

The round loop, its evaluation, its log and its checkpoints stay the driver's, as in any run. So
`ray.train.report` is not used: it would keep a second copy of each checkpoint, without the history
that the loop goes on from, in a folder that all nodes share.
"""

from __future__ import annotations

import os
import traceback
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from fedlpp_ray.config import Experiment
from fedlpp_ray.runtime.party import SOLO, Party
from fedlpp_ray.runtime.placement import bundles
from fedlpp_ray.runtime.ranks import OWN_GPU, Joined, obey
from fedlpp_ray.runtime.reactor import Reactor
from fedlpp_ray.runtime.server import ServerActor
from fedlpp_ray.runtime.trainer import Trainer


class TrainedServer(ServerActor):
    """A party whose ranks are Ray Train's workers, and whose actor is its controller.

    Raises:
        PlacementError, UserError: as `ray_backend`.
    """

    def __init__(self, experiment: Experiment, group: PlacementGroup) -> None:
        super().__init__(experiment, group, SOLO, Reactor())

    def renew(self, experiment: Experiment) -> None:
        """Put new workers in the place of some that are gone."""
        self._fit = Fit(experiment, self._group)
        self.actor = self._fit.controller
        self.begin(experiment)

    def end(self) -> None:
        """End the controller, and with it the workers that it owns."""
        super().end()
        self._fit.join()


class Fit:
    """`TorchTrainer.fit` in a thread of this process.

    Attributes:
        controller: Ray Train's actor. When that ends, so does the thread.
    """

    def __init__(self, experiment: Experiment, group: PlacementGroup) -> None:
        folder = TemporaryDirectory(prefix="fedlpp_ray-fit-", ignore_cleanup_errors=True)
        needed = bundles(experiment)
        trainer = Trainer(
            work, {}, workers=len(needed), each=needed[0], group=group, folder=folder.name
        )
        self._thread = Thread(target=_fit, args=(trainer, folder), name="fit", daemon=True)
        self._thread.start()
        self.controller = trainer.controller.result()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()


def _fit(trainer: Trainer, folder: TemporaryDirectory[str]) -> None:
    with folder:
        try:
            trainer.fit()
        except Exception as error:
            if not trainer.controller.done():
                trainer.controller.set_exception(error)
            # Otherwise whoever waits for the controller is told there.


def work(config: dict[str, Any]) -> None:
    """Of each worker: be a rank of the parties that the driver starts, until it is ended."""
    from fedlpp_ray.training import Group

    os.environ.update(OWN_GPU)
    group = Group.joined()
    if group.rank:
        obey(group)
    party = Party(ranks=Joined(group) if group.size > 1 else None)
    controller = ray.get_actor(config["controller"])
    while True:
        method, arguments = ray.get(controller.next_call.remote())
        error, result = None, None
        try:
            result = getattr(party, method)(*arguments)
        except Exception as failure:
            failure.add_note(traceback.format_exc())
            error = failure
        ray.get(controller.done.remote(error, result))
