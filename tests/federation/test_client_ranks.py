"""Clients of two ranks: the run of one process, whatever they have and train in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.server import Server
from fedlpp_ray.training import ALONE, Group
from tests import tiny
from tests.federation.test_loop import numbers
from tests.ranks import CLIENT, Ranks, close

PROMPT = {"adapter.kind": "prompt", "adapter.tokens": 4}
TOGETHER: dict[str, dict[str, object]] = {
    "shared-layer": {
        "emulator.kind": "shared-layer",
        "emulator.steps": 2,
        "server.examples": 40,
        **PROMPT,
    },
    "layer-drop": {"emulator.kind": "layer-drop", "adapter.kind": "layers", "adapter.outer": 1},
    "emulator, 4 bits": {"emulator.kind": "shared-layer", "client.base_bits": 4},
    "hetlora": {"lora.client_ranks": [2, 4, 3], "server.aggregation": "hetlora"},
    "flexlora": {"lora.client_ranks": [2, 4], "server.aggregation": "flexlora"},
    "fedbuff": {"federation.mode": "fedbuff", "federation.buffer": 2, "federation.rounds": 4},
}


@pytest.fixture(scope="module")
def experiment(
    tiny_values: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    """Without dropout, which is another on each rank; nor a quantizer, which makes much of the last
    bit of what lies between two of its values."""
    folder = tmp_path_factory.mktemp("deep")
    model = tiny.make_model(folder / "model", dropout=0.0, layers=4)
    values = {"model.name": str(model), "federation.rounds": 2, "downlink.bits": 32}
    return Experiment().with_values(tiny_values | values)


def run(group: Group, experiment: Experiment, values: dict[str, object]) -> Any:
    """The numbers of a run whose clients, of several ranks, have these values; of rank 0."""
    spread, backend = experiment.with_values(values), InProcess(experiment)
    emulator = backend._server.emulator()
    if group.rank:
        return ClientHost.follow(spread, 0, emulator, None, group)
    backend._host = host = ClientHost(spread, emulator=emulator, group=group)
    federation = Federation(experiment, backend)
    list(federation.run())
    floor = host.measure_floor()
    host.close()
    return [*numbers(federation.history), floor.base, floor.local_only]


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero",
    [pytest.param({}, id="whole"), pytest.param(CLIENT, id="spread")],
)
@pytest.mark.parametrize("kind", TOGETHER)
def test_two_ranks_make_the_run_of_one(
    experiment: Experiment, two: Ranks, kind: str, zero: dict[str, object]
) -> None:
    made = experiment.with_values(TOGETHER[kind])
    spread = {"client.num_workers": 2, **zero}
    preflight.check([made.with_values(spread)])
    alone = run(ALONE, made, {})
    assert close(two.run(run, made, spread)[0], alone)
    assert not close(run(ALONE, experiment, {}), alone)


def trained(group: Group, experiment: Experiment) -> Any:
    """Losses and updates of two clients, as far as they are the last 1,000 numbers; of rank 0."""
    if group.rank:
        return ClientHost.follow(experiment, 0, None, None, group)
    broadcast, host = Server(experiment).encode_broadcast(1), ClientHost(experiment, group=group)
    updates = [host.train(1, client, broadcast) for client in (0, 1)]
    host.close()
    ends = [bytearray(each.payload[-4000:]) for each in updates]
    return [each.loss for each in updates], [torch.frombuffer(x, dtype=torch.float32) for x in ends]


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("values", [{}, {"client.optimizer": "sgd"}], ids=["adamw", "sgd"])
def test_two_ranks_train_in_bf16_as_one_does(
    experiment: Experiment, two: Ranks, values: dict[str, object], bits: int
) -> None:
    """bf16 has 8 bits of mantissa: losses are within 2^-8, and the norm of the difference of
    updates is within 5 % of theirs; less than what bf16 itself changes."""
    exact = experiment.with_values({"client.base_bits": bits, **values})
    half = exact.with_values({"client.compute": "bf16"})
    losses, updates = trained(ALONE, half)
    found, theirs = two.run(trained, half.with_values({"client.num_workers": 2}))[0]
    assert found == pytest.approx(losses, rel=2**-8)
    for own, other, fp32 in zip(theirs, updates, trained(ALONE, exact)[1], strict=True):
        assert own.isfinite().all()
        assert (own - other).norm() <= 0.05 * other.norm()
        assert (own - other).norm() < (own - fp32).norm()


def test_fp16_is_refused(experiment: Experiment) -> None:
    """Its gradients would need a scale; bf16's do not."""
    with pytest.raises(ConfigError, match=r"client\.compute: .*'fp32' or 'bf16'"):
        experiment.with_values({"client.compute": "fp16", "client.num_workers": 2})
