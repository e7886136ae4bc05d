"""Both links: what is rounded, what is not, what a client remembers, and the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch

from fedlpp_ray.aggregation import OptimizerName
from fedlpp_ray.aggregation.products import product
from fedlpp_ray.config import ConfigError, Experiment, ServerConfig
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.client import ERROR
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.server import VARIATES
from fedlpp_ray.federation.wire import uplink_codec
from fedlpp_ray.messages import Codec, Envelope, decode, encode
from fedlpp_ray.quantization import Quantizer
from fedlpp_ray.state import VARIATE, layers_of, part, schema_of
from tests.federation.test_loop import Recording, interrupted, numbers, run, tensor_bytes

SCAFFOLD = {"client.scaffold": True, "client.optimizer": "sgd", "client.lr": 0.1}
FACTORS, HEAD = 8 * 256, 3 * 64 + 3


def one_update(experiment: Experiment) -> bytes:
    backend = InProcess(experiment)
    return backend._host.train(1, 0, backend.encode_broadcast(1)).payload


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (32, 4 * (FACTORS + HEAD)),
        ("bf16", 2 * (FACTORS + HEAD)),
        (8, FACTORS + HEAD + 4 * (8 * 4 + 3 + 1)),
        (4, (FACTORS + 192) // 2 + 2 + 4 * (8 * 4 + 3 + 1)),
    ],
)
def test_the_uplinks_bytes_are_those_counted_by_hand(
    tiny_experiment: Experiment, bits: object, expected: int
) -> None:
    assert tensor_bytes(one_update(tiny_experiment.with_values({"uplink.bits": bits}))) == expected


def test_bf16_is_the_update_rounded_to_nearest(tiny_experiment: Experiment) -> None:
    whole, half = (
        safetensors.torch.load(one_update(tiny_experiment.with_values({"uplink.bits": bits})))
        for bits in (32, 16)
    )
    for name, tensor in whole.items():
        assert half[name].dtype == torch.bfloat16
        assert torch.equal(half[name], tensor.bfloat16())
    state = {"x": torch.randn(5, 7)}
    codec = Codec(None, dtype=torch.bfloat16)
    envelope = Envelope("broadcast", 1)
    received = decode(encode(envelope, state, codec), envelope, schema_of(state), codec)
    assert torch.equal(received["x"], state["x"].bfloat16().float())


@pytest.mark.parametrize("mask", [0.0, 0.25])
def test_error_feedback_sends_later_what_rounding_took(
    tiny_experiment: Experiment, mask: float
) -> None:
    """Also where a mask of the server's leaves some columns out, the same in each round."""
    exact = tiny_experiment.with_values({"downlink.server_mask": mask})
    experiment = exact.with_values({"uplink.bits": 2, "uplink.error_feedback": True})
    backend = InProcess(experiment)
    broadcast = backend.encode_broadcast(1)
    whole = InProcess(exact)._host.train(1, 0, broadcast)
    update = safetensors.torch.load(whole.payload)
    assert {t.shape[1] for n, t in update.items() if part(n) == "A"} == {round(64 * (1 - mask))}
    codec, memory = uplink_codec(experiment.uplink), None
    sent = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    rounds = 12
    for _ in range(rounds):  # the same round again, so that the update is the same each time
        answer = backend._host.train(1, 0, broadcast, memory)
        envelope = Envelope("update", 1, 0, backend._host._text.examples[0])
        received = decode(answer.payload, envelope, schema_of(update), codec)
        sent = {name: sent[name] + received[name] for name in sent}
        memory = answer.memory
    errors = safetensors.torch.load(memory or b"")
    for name, tensor in update.items():
        # What was sent and what is still owed are together all updates: nothing is lost.
        owed = errors[f"{ERROR}{name}"]
        torch.testing.assert_close(sent[name] + owed, rounds * tensor, atol=1e-4, rtol=1e-4)
        once = Quantizer(2, "int").quantize(tensor).dequantize()
        if (once - tensor).norm() > 0:
            assert (sent[name] / rounds - tensor).norm() < 0.5 * (once - tensor).norm()


@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_alone_can_be_quantized(tiny_experiment: Experiment, factors: str) -> None:
    experiment = tiny_experiment.with_values({"downlink.factors": factors, "downlink.bits": 2})
    payload = InProcess(experiment).encode_broadcast(1)[4]
    names = safetensors.torch.load(payload)
    packed = {part(n.removesuffix(":codes")) for n in names if n.endswith(":codes")}
    assert packed == {factors, "head"}
    assert {part(n) for n in names if ":" not in n} == {"A", "B"} - {factors}


def test_rotation_changes_the_codes_and_without_quantization_nothing_else(
    tiny_experiment: Experiment,
) -> None:
    """SGD is indifferent to the gauge; the tolerance is fp32's through two rounds."""
    values = {"client.optimizer": "sgd", "client.lr": 0.3, "federation.rounds": 2}
    plain = tiny_experiment.with_values(values | {"downlink.bits": 32, "client.weight_decay": 0.0})
    rotated = plain.with_values({"downlink.rotate": "round"})
    histories = [run(plain), run(rotated)]
    for one, other in zip(*histories, strict=True):
        assert one.evaluation is not None
        assert one.evaluation.server is not None
        assert other.evaluation is not None
        assert other.evaluation.server is not None
        assert one.evaluation.server["loss"] == pytest.approx(
            other.evaluation.server["loss"], abs=1e-5
        )
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
    backends = [Recording(e) for e in (plain, rotated)]
    for backend in backends:
        list(Federation(backend._server._experiment, backend).run())
    states = [[safetensors.torch.load(b.sent[r][4]) for r in (1, 2)] for b in backends]
    name = next(n for n in states[0][0] if part(n) == "A")
    assert not torch.allclose(states[0][0][name], states[1][0][name], atol=1e-3)
    gram = [state[0][name].T @ state[0][name] for state in states]
    torch.testing.assert_close(gram[0], gram[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("every", "how"), [(1, "round"), (2, "round"), (1, "client")])
def test_a_rotated_run_ends_at_the_products_of_a_plain_one(
    tiny_experiment: Experiment, every: int, how: str
) -> None:
    """So the server turns each update back, by the rotation of the message in force. In fp32 the
    two differ by some 3e-7; the tolerance is 1e-4."""
    values = {"client.optimizer": "sgd", "client.lr": 0.3, "client.weight_decay": 0.0}
    plain = tiny_experiment.with_values(
        values | {"downlink.bits": 32, "downlink.every": every, "evaluation.every": 3}
    )
    states = []
    for experiment in (plain, plain.with_values({"downlink.rotate": how})):
        backend = InProcess(experiment)
        list(Federation(experiment, backend).run())
        states.append(backend._server._state)
    for layer in layers_of(states[0]):
        one, other = (product(state, layer).dense() for state in states)
        assert (one - other).norm() < 1e-4 * one.norm()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"downlink.rotate": "round", "server.aggregation": "ffa-lora"},
            r"rotate turns A and B together.*'ffa-lora' only B travels",
        ),
        (
            {"downlink.rotate": "round", "uplink.error_feedback": True, "uplink.bits": 4},
            r"error_feedback adds what.*rotate turns every round another way",
        ),
        (SCAFFOLD | {"server.aggregation": "flexlora"}, r"scaffold: .*'flexlora' does not average"),
        (SCAFFOLD | {"lora.client_ranks": [2, 4], "server.aggregation": "hetlora"}, "scaffold"),
        (SCAFFOLD | {"downlink.rotate": "round"}, r"scaffold: downlink.rotate turns"),
        (SCAFFOLD | {"federation.sampling": "examples"}, r"scaffold: federation.sampling"),
        (
            {"server.optimizer": "fedadam", "server.aggregation": "flexlora"},
            r"server.optimizer 'fedadam'.*'flexlora'.*allowed: fedavg",
        ),
    ],
)
def test_links_and_methods_that_do_not_go_together_are_refused(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check([tiny_experiment.with_values(values)])


def test_error_feedback_of_an_exact_uplink_is_refused(tiny_experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match=r"error_feedback needs uplink.bits below 32"):
        tiny_experiment.with_values({"uplink.error_feedback": True})


def test_the_configuration_names_the_optimisers_that_there_are() -> None:
    annotation = ServerConfig.model_fields["optimizer"].annotation
    assert get_args(annotation) == get_args(OptimizerName)


def test_scaffold_under_adamw_is_refused(tiny_experiment: Experiment) -> None:
    for values in ({}, {"client.optimizer": "sgd", "client.momentum": 0.9}):
        with pytest.raises(ConfigError, match=r"scaffold needs client.optimizer 'sgd'"):
            tiny_experiment.with_values({"client.scaffold": True} | values)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_scaffolds_server_variate_is_the_mean_of_the_clients(
    tiny_experiment: Experiment, tmp_path: Path, weighting: str
) -> None:
    """With clients that take no part in a round, and after an interruption. Tolerance 1e-5."""
    values = {"server.weighting": weighting, "downlink.bits": 8, "federation.rounds": 4}
    experiment = tiny_experiment.with_values(
        SCAFFOLD | values | {"federation.partition": "dirichlet"}
    )
    preflight.check([experiment])
    federation, restored = interrupted(experiment, tmp_path, after=2)
    assert numbers(restored.history) == numbers(federation.history)
    server = safetensors.torch.load(federation.backend.adapter()[VARIATES])
    examples = federation.backend.examples()
    for name, c in server.items():
        assert c.any()
        mean = torch.zeros_like(c, dtype=torch.float64)
        for client, memory in federation.snapshot().memories.items():
            own = safetensors.torch.load(memory.read())[f"{VARIATE}{name}"].double()
            share = examples[client] / sum(examples) if weighting == "examples" else 1 / 8
            mean += share * own
        torch.testing.assert_close(c.double(), mean, atol=1e-5, rtol=1e-4)


def test_scaffolds_variate_travels_quantized_and_is_counted(tiny_experiment: Experiment) -> None:
    plain = tiny_experiment.with_values(SCAFFOLD | {"client.scaffold": False, "downlink.bits": 4})
    sizes = [
        tensor_bytes(InProcess(e).encode_broadcast(1)[4])
        for e in (plain, plain.with_values({"client.scaffold": True}))
    ]
    assert sizes[1] == 2 * sizes[0]
