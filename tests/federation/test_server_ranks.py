"""A server, or a client, of several ranks: the same experiment as with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.data import FederatedText
from fedlpp_ray.federation.emulation import load_client_base
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.server import Server
from fedlpp_ray.messages import MessageError
from fedlpp_ray.training import Group
from tests import tiny
from tests.federation.test_loop import numbers
from tests.ranks import CLIENT, FINISHED, SERVER, STAGE_2, TUNED, Ranks, close

ADAPTERS: list[dict[str, object]] = [
    {"adapter.kind": "lora"},
    {"adapter.kind": "prompt", "adapter.tokens": 4},
    {"adapter.kind": "layers", "adapter.outer": 1},
    {"lora.modules_to_save": ["embeddings"]},
]


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "llama")), "gpt2"],
)
def experiment(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    classified: Experiment,
) -> Experiment:
    rounds = {"federation.rounds": 2, "client.base_bits": 4, "downlink.bits": 4}
    if request.param == "bert":
        return classified.with_values({"evaluation.batch_size": 16} | rounds)
    values = tiny.make_writing(tmp_path_factory.mktemp(request.param), request.param)
    return Experiment().with_values(values | {"generation.beams": 2} | rounds)


@pytest.fixture(scope="module")
def classified(tiny_values: Any, still_model: Path) -> Experiment:
    return Experiment().with_values(tiny_values | {"model.name": str(still_model)})


def run(group: Group, experiment: Experiment) -> Any:
    """The numbers of a run and of its final model; of rank 0."""
    if group.rank:
        return Server.follow(experiment, group)
    backend = InProcess(experiment, group)
    federation = Federation(experiment, backend)
    list(federation.run())
    backend.close()
    return numbers_of(federation)


def numbers_of(federation: Federation) -> list[dict[str, object]]:
    final = [{"bytes": None} | federation.final.to_dict()] if federation.final else []
    return numbers(federation.history) + final


def test_a_run_has_the_same_bits_on_one_rank_on_two_and_on_four(
    experiment: Experiment, two: Ranks, four: Ranks
) -> None:
    """Metrics, what is written, digests of the states, bytes; spread, or whole on each rank."""
    alone = run(Group(), experiment)
    for ranks in (two, four):
        assert ranks.run(run, experiment.with_values(SERVER))[0] == alone
    assert two.run(run, experiment)[0] == alone


@pytest.mark.slow
def test_a_run_whose_server_trains_too_differs_by_rounding_alone(
    experiment: Experiment, two: Ranks, four: Ranks
) -> None:
    """Each rank takes a part of a batch; 3 steps of 8 or 16 examples, of which the last is 5."""
    tuned = experiment.with_values(FINISHED)
    alone = run(Group(), tuned)
    plain = run(Group(), experiment.with_values({"server.examples": 21}))
    assert not close(alone[: len(plain)], plain)
    for ranks, values in ((two, SERVER), (four, SERVER), (two, STAGE_2), (four, {})):
        found = ranks.run(run, tuned.with_values(values))[0]
        assert close(found, alone)
        assert [each["bytes"] for each in found] == [each["bytes"] for each in alone]


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        *ADAPTERS[1:],
        {
            "adapter.kind": "prompt",
            "adapter.tokens": 4,
            "emulator.kind": "shared-layer",
            "emulator.steps": 2,
            "server.examples": 40,
        },
        {"adapter.kind": "layers", "adapter.outer": 1, "emulator.kind": "layer-drop"},
    ],
    ids=lambda values: " ".join(map(str, values.values())),
)
def test_every_adapter_and_emulator_goes_with_a_server_that_is_spread(
    classified: Experiment, two: Ranks, tmp_path: Path, values: dict[str, object]
) -> None:
    model = tiny.make_model(tmp_path / "model", dropout=0.0, layers=4)
    made = classified.with_values({"model.name": str(model), "federation.rounds": 2} | values)
    assert close(two.run(run, made.with_values(SERVER))[0], run(Group(), made))


def trained(group: Group, experiment: Experiment) -> Any:
    """What a client host of several ranks returns; of rank 0."""
    if group.rank:
        return ClientHost.follow(experiment, 0, None, None, group)
    server = Server(experiment)
    broadcast, host = server.encode_broadcast(1), ClientHost(experiment, group=group)
    first = host.train(1, 0, broadcast)
    with pytest.raises(MessageError):
        host.train(2, 0, broadcast)  # another round's: refused by all, who go on
    second = host.train(1, 1, broadcast)
    floor = host.measure_floor()
    measured = host.evaluate(1, broadcast)
    host.close()
    states = [
        torch.frombuffer(bytearray(u.payload[-4000:]), dtype=torch.float32) for u in (first, second)
    ]
    return [first.loss, second.loss, *measured, floor.base, floor.local_only, states]


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [{}, {"client.base_bits": 4} | CLIENT, CLIENT, {"client.proximal": 0.1} | CLIENT],
    ids=["whole", "packed, spread", "dense, spread", "FedProx"],
)
def test_a_client_of_two_ranks_trains_as_one_does(
    classified: Experiment, two: Ranks, values: dict[str, object]
) -> None:
    made = classified.with_values(values)
    own = {key: value for key, value in values.items() if not key.startswith("client.zero")}
    alone = trained(Group(), classified.with_values(own))
    *found, states = two.run(trained, made)[0]
    *expected, theirs = alone
    assert close(found, expected)
    for state, other in zip(states, theirs, strict=True):
        assert torch.allclose(state, other, atol=1e-5)


def given(group: Group, experiment: Experiment) -> Any:
    """The base that clients receive before and after a run, and whether that trained; of rank 0."""
    if group.rank:
        return Server.follow(experiment, group)
    backend = InProcess(experiment, group)
    server = backend._server
    identity = server.base_identity()
    assert identity is not None

    def parts() -> list[bytes]:
        return [server.base_part(number) for number in range(identity[1])]

    before, state = parts(), backend.adapter()
    federation = Federation(experiment, backend)
    list(federation.run())
    after, trained = parts(), backend.adapter()
    backend.close()
    return before, after, state != trained


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("values", ADAPTERS, ids=lambda values: " ".join(map(str, values.values())))
def test_what_a_server_that_trains_gives_away_stays_the_base_of_one_process(
    classified: Experiment, two: Ranks, values: dict[str, object], bits: int
) -> None:
    own = {"federation.rounds": 1, "client.base_bits": bits}
    made = classified.with_values(TUNED | own | values)
    before, after, trained = two.run(given, made.with_values(SERVER))[0]
    assert trained
    assert after == before
    base = load_client_base(made, FederatedText(made))
    expected = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    found = {name: x for each in before for name, x in safetensors.torch.load(each).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def resumed(group: Group, experiment: Experiment) -> Any:
    """A run on a spread server that ends after the first round and goes on in a new one."""
    if group.rank:
        Server.follow(experiment, group)
        return Server.follow(experiment, group)
    backend = InProcess(experiment, group)
    first = Federation(experiment, backend)
    next(first.run())
    snapshot = first.snapshot()
    backend.close()
    backend = InProcess(experiment, group)
    second = Federation(experiment, backend)
    second.restore(snapshot)
    list(second.run())
    backend.close()
    return numbers_of(second)


def test_a_spread_server_saves_and_resumes_with_the_same_bits(
    classified: Experiment, two: Ranks
) -> None:
    made = classified.with_values(SERVER | FINISHED)
    assert two.run(resumed, made)[0] == two.run(run, made)[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server.tune_steps": 2}, "server.examples above 0"),
        (
            TUNED | {"server.aggregation": "fedsa-lora", "evaluation.server": False},
            "no whole model",
        ),
        (
            {"server.zero.stage": 3, "server.aggregation": "flora"},
            "server.zero.stage 3: server.agg",
        ),
        (
            {"server.zero.stage": 3, "client.base_bits": 8, "client.base_format": "bitsandbytes"},
            "format 'packed'",
        ),
        (
            {"client.zero.stage": 3, "client.base_bits": 8, "client.base_format": "bitsandbytes"},
            "cannot be cut; allowed: packed",
        ),
        ({"client.zero.stage": 3, "client.compute": "bf16"}, "allowed: fp32"),
        ({"client.zero.stage": 2}, "allowed: 0, 3"),
        ({"server.num_workers": 2, "runtime.server_gpus": 0.5}, "no two ranks on one GPU"),
        ({"client.num_workers": 2, "runtime.min_client_actors": 1}, "min_client_actors to null"),
        (
            {
                "method": "centralised",
                "server.zero.stage": 3,
                "emulator.kind": "shared-layer",
                "adapter.kind": "prompt",
            },
            "emulator.kind 'none'",
        ),
        ({"client.num_workers": 2, "method": "centralised"}, "has no client actors"),
        ({"server.zero.stage": 3, "server.zero.offload_param.device": "moon"}, "DeepSpeed says"),
    ],
)
def test_what_ranks_cannot_do_is_refused_in_words(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check([tiny_experiment.with_values(values)])
