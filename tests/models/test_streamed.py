"""A base that a client receives from the server, layer by layer, instead of a checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlpp_ray.assets import AssetError
from fedlpp_ray.base_stream import BaseStream
from fedlpp_ray.config import ClientConfig, ModelConfig
from fedlpp_ray.models import Base, BaseParts, receive_base, share_base
from tests.models.test_shared_base import MODELS, base_of, folders, own_cache

__all__ = ["folders", "own_cache"]  # fixtures

PACKED = ClientConfig(base_bits=4)


def stream_of(base: Base, whole: list[str], asked: list[int]) -> BaseStream:
    """From a server that is not spread."""
    parts = BaseParts(base, base.load()[0], PACKED, whole)

    def part(number: int) -> bytes:
        asked.append(number)
        return parts.part(number)

    return BaseStream(parts.identity, len(parts), part)


def without_weights(base: Base, folder: Path) -> Base:
    """The model as a client knows it: configuration and tokenizer."""
    shutil.copytree(base.model.name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return replace(base, model=ModelConfig(name=str(folder)))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_the_checkpoint_gives_and_is_received_once_a_node(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    base, asked = base_of(name, folders[name]), list[int]()
    stream = stream_of(base, [], asked)
    client = without_weights(base, tmp_path / "client")
    expected = share_base(base, PACKED)
    for _ in range(2):
        found = receive_base(client, PACKED, lambda _: [], stream)
        for (key, tensor), (other, theirs) in zip(
            [*found.named_parameters(), *found.named_buffers()],
            [*expected.named_parameters(), *expected.named_buffers()],
            strict=True,
        ):
            assert key == other
            assert torch.equal(tensor, theirs)
            assert not tensor.requires_grad
    assert asked == list(range(stream.count))


def test_what_is_trained_is_sent_as_it_was_before_training(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """What the server trains in place is not given away."""
    base = base_of("bert", folders["bert"])
    model, name = base.load()[0], "bert.encoder.layer.0"
    before = {n: p.clone() for n, p in model.get_submodule(name).named_parameters()}
    parts = BaseParts(base, model, PACKED, [name])
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.fill_(7.0)
    stream = BaseStream(parts.identity, len(parts), parts.part)
    client = without_weights(base, tmp_path / "client")
    found = receive_base(client, PACKED, lambda _: [name], stream).get_submodule(name)
    assert all(torch.equal(p, before[n]) for n, p in found.named_parameters())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("received", [False, True])
def test_a_client_with_another_configuration_says_what_differs(
    folders: dict[str, Path], tmp_path: Path, layers: int, *, received: bool
) -> None:
    """Also where another process of its node has the base already."""
    base = base_of("llama", folders["llama"])
    client = without_weights(base, tmp_path / "client")
    path = tmp_path / "client" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    if received:
        receive_base(base, PACKED, lambda _: [], stream_of(base, [], []))
    with pytest.raises(AssetError, match=rf"differ in model\.layers\.{min(layers, 2)}"):
        receive_base(client, PACKED, lambda _: [], stream_of(base, [], []))
