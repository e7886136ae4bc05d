"""The whole federation against a plain dense one written for these tests (`dense.py`)."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.adapter import ADAPTER_STATE
from fedlpp_ray.federation.in_process import InProcess
from tests.federation import dense

QUANTIZED_TOLERANCE = 2e-5
"""Absolute, on states whose entries are up to 1. Codes are the same on both sides; levels and
scales differ in the last bit of fp32, which local training carries on."""


def compare(experiment: Experiment, tolerance: float) -> None:
    backend = InProcess(experiment)

    def state() -> dict[str, torch.Tensor]:
        return safetensors.torch.load(backend.adapter()[ADAPTER_STATE])

    expected = dense.run(experiment, initial=state())
    federation = Federation(experiment, backend)
    for record, (reference, server, client) in zip(federation.run(), expected, strict=True):
        found = state()
        assert found.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)
        assert record.evaluation is not None
        assert record.evaluation.server["accuracy"] == pytest.approx(server, abs=1e-12)
        assert record.evaluation.client_before["accuracy"] == pytest.approx(client, abs=1e-12)


@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
def test_at_full_precision_bit_for_bit(tiny_experiment: Experiment, rule: str) -> None:
    values = {"downlink.bits": 32, "server.rule": rule, "server.lr": 0.7}
    compare(tiny_experiment.with_values(values), tolerance=0)


def test_uniform_weights_bit_for_bit_and_uneven_shares(tiny_experiment: Experiment) -> None:
    """The project divides by the sum of the weights at the end, and the reference divides each
    weight: where shares are uneven a mean differs in float64's last bit, so that an entry is seldom
    another fp32 number, which local training carries on."""
    for weighting, tolerance in (("uniform", 0), ("examples", 1e-6)):
        values = {
            "downlink.bits": 32,
            "federation.partition": "dirichlet",
            "server.weighting": weighting,
        }
        compare(tiny_experiment.with_values(values), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
@pytest.mark.parametrize("bits", [2, 4])
def test_quantized_downlink(tiny_experiment: Experiment, rule: str, bits: int) -> None:
    values = {"downlink.bits": bits, "server.rule": rule}
    compare(tiny_experiment.with_values(values), QUANTIZED_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 32])
@pytest.mark.parametrize(
    "values",
    [
        {"downlink.every": 2, "federation.rounds": 5},
        {"downlink.server_mask": 0.3},
        {"downlink.client_mask": 0.3},
        {"downlink.server_mask": 0.25, "downlink.client_mask": 0.25},
        {"downlink.every": 3, "downlink.server_mask": 0.5, "federation.rounds": 4},
    ],
    ids=lambda values: " ".join(f"{k.partition('.')[2]}={v}" for k, v in values.items()),
)
def test_broadcasts_that_last_and_masks(
    tiny_experiment: Experiment, values: dict[str, object], bits: int
) -> None:
    experiment = tiny_experiment.with_values({"downlink.bits": bits, "server.lr": 0.7} | values)
    compare(experiment, 0 if bits == 32 else QUANTIZED_TOLERANCE)


def test_quantized_client_base(tiny_experiment: Experiment) -> None:
    values = {"downlink.bits": 4, "client.base_bits": 3}
    compare(tiny_experiment.with_values(values), QUANTIZED_TOLERANCE)
