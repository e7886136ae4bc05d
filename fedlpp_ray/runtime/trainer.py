"""Ray Train's `TorchTrainer` in a reservation that the run already has.

Ray Train makes a placement group of its own for its workers. In a sweep each trial has reserved all
that it needs before it starts, as one gang, so that trials neither wait for each other half started
nor pile up: workers outside of that would be reserved twice, or wait for room that the trials hold.
No public option puts them inside, so this file, alone, builds on names that are internal to Ray
Train 2.60. Of Ray Train's own the run does without what is then needless: the placement group with
its cleaner, the request for nodes, the watcher of preemptions (a lost worker ends the training
anyway, and the driver begins it again from its last snapshot).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import BackendSetupCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import PlacementGroupHandle, WorkerGroup
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedlpp_ray.errors import UserError
from fedlpp_ray.runtime.placement import Bundle
from fedlpp_ray.runtime.ranks import RankLost


class Reserved(PlacementGroupHandle):  # type: ignore[misc]
    """The reservation that this process is in: made before the workers, and there after them."""

    @property
    def placement_group(self) -> PlacementGroup:
        """It."""
        return get_current_placement_group()

    def ready(self) -> Any:
        """A reference that is there with it."""
        return self.placement_group.ready()

    def wait(self, timeout_seconds: float = 0) -> bool:
        """Whoever made it has waited for it."""
        return True

    def shutdown(self) -> None:
        """Whoever made it gives it back."""


class Workers(WorkerGroup):  # type: ignore[misc]
    """Worker i has bundle i of the reservation."""

    def _create_placement_group(self, *_: Any) -> Reserved:
        return Reserved()


class Fixed(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as asked for; nothing is asked of an autoscaler, who knows of the trial's."""

    def after_controller_start(self, *_: Any) -> None:
        """Ask for nothing."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Controller(TrainController):  # type: ignore[misc]
    """Ray Train's actor, in which the driver's calls also meet the worker that serves them.

    To the driver it is what a `Party` is. Worker 0 takes each call with `next_call` and answers it
    with `done`, in this order.
    """

    worker_group_cls = Workers

    def __init__(self, **arguments: Any) -> None:
        self._asked: asyncio.Queue[tuple[str, tuple[Any, ...]]] = asyncio.Queue()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._over: Exception | None = None
        os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
        super().__init__(**arguments)
        del os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR]  # it would pass it on to the workers

    async def run(self) -> None:
        """Train, and tell whoever waits for a worker why that has ended."""
        await super().run()
        self._over = _why(self.get_training_failed_error())
        for future in self._waiting:
            future.set_exception(self._over)

    async def start(self, name: str, *arguments: Any) -> Any:
        """`Party.start`."""
        return await self._ask("start", name, *arguments)

    async def call(self, method: str, *arguments: Any) -> Any:
        """`Party.call`."""
        return await self._ask("call", method, *arguments)

    async def answer(self) -> None:
        """`Party.answer`."""

    async def _ask(self, method: str, *arguments: Any) -> Any:
        if self._over:
            raise self._over
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._asked.put_nowait((method, arguments))
        return await future

    async def next_call(self) -> tuple[str, tuple[Any, ...]]:
        """What the worker is to do: a method of `Party`, and its arguments."""
        return await self._asked.get()

    async def done(self, error: Exception | None, result: Any) -> None:
        """Answer the oldest call that waits."""
        future = self._waiting.popleft()
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)


def _why(error: Any) -> Exception:
    """The refusal of one of the workers, or else how the first that is gone went."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in failures.items():
        if isinstance(failure, UserError):
            return UserError(f"rank {rank}: {failure}")
    gone = {
        rank: failure.health_check_failure
        for rank, failure in failures.items()
        if isinstance(failure, WorkerHealthCheckFailedError)
    }
    for rank, failure in (gone or failures).items():
        return RankLost(f"rank {rank}: {_first_line(failure)}")
    return RankLost(_first_line(getattr(error, "controller_failure", error)))


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0]


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Runs one function on each of some workers, until it is ended from outside or one is lost.

    Args:
        function: Is given `config`.
        config: Plain values.
        workers: Their number.
        each: What each takes: all of a bundle, worker i of bundle i.
        group: Reservation.
        folder: Temporary, for what Ray Train writes.

    Attributes:
        controller: Its actor, once there; its name is that of the last part of `folder`.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        *,
        workers: int,
        each: Bundle,
        group: PlacementGroup,
        folder: str,
    ) -> None:
        # Restarts are the driver's, which alone has the state to go on from; it counts them.
        never = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
        self._group, self._name = group, os.path.basename(folder)
        self.controller: Future[Any] = Future()
        super().__init__(
            function,
            train_loop_config=config | {"controller": self._name},
            scaling_config=ScalingConfig(
                num_workers=workers, resources_per_worker=each, use_gpu=bool(each.get("GPU"))
            ),
            run_config=RunConfig(name=self._name, storage_path=folder, failure_config=never),
        )

    def _create_default_callbacks(self) -> list[Any]:
        """What makes the workers a process group, and no more."""
        return [BackendSetupCallback(self.backend_config)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        place = PlacementGroupSchedulingStrategy(
            self._group, placement_group_capture_child_tasks=True
        )
        options = {"num_cpus": 0, "name": self._name, "scheduling_strategy": place}
        arguments["scaling_policy"] = Fixed(self.scaling_config)
        controller = ray.remote(Controller).options(**options).remote(**arguments)
        self.controller.set_result(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
