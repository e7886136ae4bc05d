"""The best low-rank fit of what quantizing takes from a base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedlpp_ray.config import ClientConfig, ModelConfig
from fedlpp_ray.models import Correction, head_modules, load_classifier, load_generator
from fedlpp_ray.models.base import linears, quantize_base
from fedlpp_ray.models.correction import best_of_rank
from tests import tiny

COARSE = ClientConfig(base_bits=2)
DENSE = COARSE.model_copy(update={"dequantize_at_load": True})


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 has a Conv1D for each linear layer."""
    folder = tmp_path_factory.mktemp(request.param)
    make = tiny.make_model(folder) if request.param == "bert" else None
    return make or tiny.make_generator(folder, family="gpt2")


def loaded(family: Path) -> nn.Module:
    config = ModelConfig(name=str(family))
    if family.name.startswith("bert"):
        return load_classifier(config, 3, pad=0, seed=0)
    return load_generator(config, pad=0)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the layers that a client has quantized, (out, in)."""
    return {name: layer.weight.detach() for name, layer in linears(model, []).items()}


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12, 99])
def test_it_is_the_singular_value_decomposition_cut_at_the_rank(
    shape: tuple[int, int], rank: int
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    kept = min(rank, len(s))
    expected = (u[:, :kept] * s[:kept]) @ vh[:kept]
    found = best_of_rank(matrix, rank)
    assert found.left.shape == (shape[0], min(rank, *shape))
    assert found.right.shape == (min(rank, *shape), shape[1])
    assert np.allclose((found.left @ found.right).numpy(), expected, atol=1e-5)


def test_at_full_rank_the_corrected_base_is_that_of_a_client(family: Path) -> None:
    model, client = loaded(family), quantize_base(loaded(family), DENSE)
    plain = weights(model)
    Correction(model, COARSE, 10_000, []).fold()
    found, expected = weights(model), weights(client)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
        assert not torch.allclose(weight, plain[name], atol=1e-2), name
    for name in head_modules(model):
        for tensor, other in zip(
            model.get_submodule(name).parameters(),
            loaded(family).get_submodule(name).parameters(),
            strict=True,
        ):
            assert torch.equal(tensor, other)


def test_a_higher_rank_comes_closer_and_no_layer_keeps_what_was_added(family: Path) -> None:
    model, client = loaded(family), weights(quantize_base(loaded(family), DENSE))
    before = weights(model)
    for name, weight in before.items():
        distances = [(weight - client[name]).norm()]
        for rank in (4, 16, 48):
            with Correction(model, COARSE, rank, []).applied():
                distances.append((weights(model)[name] - client[name]).norm())
        assert distances == sorted(distances, reverse=True)
        assert len(set(distances)) == 4
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_block_that_fails_leaves_the_base_as_it_was(family: Path) -> None:
    model = loaded(family)
    parameters = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), Correction(model, COARSE, 4, []).applied():
        raise ZeroDivisionError
    assert all(found is parameters[name] for name, found in model.named_parameters())


def test_what_is_written_is_what_is_added_and_what_is_trained_whole_has_none(
    tiny_model: Path,
) -> None:
    model = load_classifier(ModelConfig(name=str(tiny_model)), 3, pad=0, seed=0)
    whole = ["bert.pooler", "bert.encoder.layer.1"]
    before, correction = weights(model), Correction(model, COARSE, 8, whole)
    tensors = correction.tensors()
    layers = {name.rpartition(".")[0] for name in tensors}
    assert layers == {name for name in before if name.startswith("bert.encoder.layer.0.")}
    correction.fold()
    for name, weight in weights(model).items():
        if name in layers:
            expected = before[name] + tensors[f"{name}.left"] @ tensors[f"{name}.right"]
            assert torch.equal(weight, expected)
        else:
            assert torch.equal(weight, before[name])
