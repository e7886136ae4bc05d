"""A base that processes of a node share is the base that each would load alone, bit for bit."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlpp_ray import cache
from fedlpp_ray.config import ClientConfig, ModelConfig
from fedlpp_ray.models import Base, PackedLinear, quantize_base, share_base
from fedlpp_ray.models import shared as module
from fedlpp_ray.models.head import head_modules
from tests import tiny

FORMATS = {
    "full": {},
    "packed-4": {"base_bits": 4},
    "packed-3-double": {"base_bits": 3, "base_scale": "double", "base_block": 32},
    "packed-8-fp16": {"base_bits": 8, "base_kind": "int", "base_scale": "fp16"},
    "dense-4": {"base_bits": 4, "dequantize_at_load": True},
    "bitsandbytes-4": {"base_bits": 4, "base_format": "bitsandbytes"},
}
MODELS = ["bert", "qwen2-classifier", "llama", "llama-untied", "gpt2", "qwen2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny.make_model(root / "bert"),
        "qwen2-classifier": tiny.make_decoder(root / "qwen2-classifier"),
        "llama": tiny.make_generator(root / "llama"),
        "llama-untied": tiny.make_generator(root / "llama-untied", tied=False),
        "gpt2": tiny.make_generator(root / "gpt2", family="gpt2"),
        "qwen2": tiny.make_generator(root / "qwen2", family="qwen2"),
    }


def base_of(name: str, folder: Path, seed: int = 0) -> Base:
    classifies = name in ("bert", "qwen2-classifier")
    return Base(ModelConfig(name=str(folder)), 3 if classifies else None, pad=0, seed=seed)


def head(model: nn.Module) -> list[str]:
    return [] if model.can_generate() else head_modules(model)  # type: ignore[operator]


def alone(base: Base, config: ClientConfig) -> nn.Module:
    model, _ = base.load()
    return quantize_base(model, config, head(model))


def half(folder: Path, target: Path) -> Path:
    """The same model with bf16 weights, which no process can map as fp32."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halved, target / "model.safetensors", {"format": "pt"})
    return target


def ties(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(groups.values())


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert str(found) == str(expected)
    assert ties(found) == ties(expected)
    ours = dict(found.named_parameters()) | dict(found.named_buffers())
    theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
        assert not ours[name].requires_grad
    assert list(found.state_dict()) == list(expected.state_dict())
    assert {n: m.training for n, m in found.named_modules()} == {
        n: m.training for n, m in expected.named_modules()
    }
    assert found.config.to_dict() == expected.config.to_dict()  # type: ignore[operator, union-attr]
    assert found.name_or_path == expected.name_or_path
    if found.can_generate():  # type: ignore[operator]
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()  # type: ignore[operator, union-attr]
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(found(input_ids=tokens).logits, expected(input_ids=tokens).logits)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_base_is_that_which_is_loaded_alone(
    folders: dict[str, Path], name: str, format: str
) -> None:
    base, config = base_of(name, folders[name]), ClientConfig.model_validate(FORMATS[format])
    expected = alone(base, config)
    for _ in ("made", "found"):
        assert_same(share_base(base, config, head), expected)


def in_files(model: nn.Module) -> set[str]:
    ranges = cache.mapped_ranges()
    return {
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if any(first <= tensor.data_ptr() < last for first, last in ranges)
    }


@pytest.mark.parametrize("format", ["packed-4", "dense-4"])
def test_the_frozen_is_mapped_and_the_trained_is_not(folders: dict[str, Path], format: str) -> None:
    model = share_base(
        base_of("bert", folders["bert"]), ClientConfig.model_validate(FORMATS[format]), head
    )
    every = {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    assert every - in_files(model) == {"classifier.weight", "classifier.bias"}


def test_a_checkpoint_that_can_be_mapped_itself_gets_no_second_file(
    folders: dict[str, Path], own_cache: Path
) -> None:
    model = share_base(base_of("llama", folders["llama"]), ClientConfig(), head)
    assert {n for n, _ in model.named_parameters()} <= in_files(model)
    assert not own_cache.exists()


def test_another_precision_is_converted_once(
    folders: dict[str, Path], tmp_path: Path, own_cache: Path
) -> None:
    base = base_of("llama", half(folders["llama"], tmp_path / "half"))
    expected = alone(base, ClientConfig())
    for _ in ("made", "found"):
        model = share_base(base, ClientConfig(), head)
        assert_same(model, expected)
        assert {n for n, _ in model.named_parameters()} <= in_files(model)
    assert len(list(own_cache.glob("bases/*.safetensors"))) == 1


def test_what_is_found_needs_no_checkpoint(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = base_of("bert", folders["bert"]), ClientConfig(base_bits=4)
    share_base(base, config, head)
    monkeypatch.setattr(module.Base, "load", None)
    share_base(base, config, head)


def test_writing_to_one_changes_no_other(folders: dict[str, Path]) -> None:
    base, config = base_of("gpt2", folders["gpt2"]), ClientConfig(base_bits=4)
    expected = alone(base, config)
    spoilt = share_base(base, config, head)
    with torch.no_grad():
        for tensor in (*spoilt.parameters(), *spoilt.buffers()):
            tensor.zero_()
    assert_same(share_base(base, config, head), expected)


def test_seeds_share_all_but_the_head(folders: dict[str, Path], own_cache: Path) -> None:
    config = ClientConfig(base_bits=4)
    for seed in (0, 1):
        base = base_of("bert", folders["bert"], seed)
        assert_same(share_base(base, config, head), alone(base, config))
    sizes = sorted(file.stat().st_size for file in own_cache.glob("bases/*.safetensors"))
    assert len(sizes) == 3
    assert sizes[1] < sizes[2] / 4


def test_changed_weights_are_read_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = half(folders["llama"], tmp_path / "changing")
    file, config = folder / "model.safetensors", ClientConfig(base_bits=4)
    base = base_of("llama", folder)
    before = share_base(base, config, head).state_dict()
    times = file.stat()
    weights = {name: -tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})  # as many bytes
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # and as old, as far as it says
    after = share_base(base, config, head)
    assert_same(after, alone(base, config))
    assert not torch.equal(before["model.embed_tokens.weight"], after.get_input_embeddings().weight)  # type: ignore[operator]


def test_what_is_trained_whole_is_not_quantized(folders: dict[str, Path]) -> None:
    base, config = base_of("llama", folders["llama"]), ClientConfig(base_bits=4)

    def first(model: nn.Module) -> list[str]:
        return ["model.layers.0"]

    for named in (head, first):
        model = share_base(base, config, named)
        linear = model.get_submodule("model.layers.0.mlp.up_proj")
        assert isinstance(linear, PackedLinear) == (named is head)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "no header"])
def test_a_damaged_file_is_made_anew(
    folders: dict[str, Path], own_cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, config = base_of("llama", folders["llama"]), ClientConfig(base_bits=4)
    expected = alone(base, config)
    share_base(base, config, head)
    (file,) = own_cache.glob("bases/*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # not in place: it is mapped
    changed = {"flipped": content, "cut": content[:-9], "empty": b"", "no header": b"x" * 99}
    file.write_bytes(changed[damage])
    assert_same(share_base(base, config, head), expected)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert_same(share_base(base, config, head), expected)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path / "file"))
    base, config = base_of("bert", folders["bert"]), ClientConfig(base_bits=4)
    with caplog.at_level(logging.WARNING):
        assert_same(share_base(base, config, head), alone(base, config))
    assert "shares no memory" in caplog.text


def _count(folder: str, log: str) -> None:
    def make() -> cache.Tensors:
        with Path(log).open("a") as file:
            file.write("made\n")
        time.sleep(0.2)  # long enough for the others to come
        return {"x": torch.arange(1000)}

    os.environ["FEDLPP_RAY_CACHE"] = folder
    assert torch.equal(cache.share("k", {"a": 1}, make)["x"], torch.arange(1000))


def test_of_several_at_once_one_makes_it(tmp_path: Path, own_cache: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    arguments = (str(own_cache), str(log))
    processes = [context.Process(target=_count, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "made\n"
    assert not list(own_cache.glob("k/.*"))


def test_content_is_told_apart(own_cache: Path) -> None:
    for value in (1, 2, "1", [1]):
        text = torch.tensor(list(json.dumps(value).encode()))
        assert torch.equal(cache.share("k", {"a": value}, lambda x=text: {"x": x})["x"], text)
    assert len(list(own_cache.glob("k/*.safetensors"))) == 4


@pytest.mark.parametrize("format", ["full", "packed-4"])
def test_a_head_that_its_checkpoint_unties_is_loaded_alone(
    folders: dict[str, Path], tmp_path: Path, format: str
) -> None:
    """config.json says that the head is the embeddings, and the file has another."""
    folder = half(folders["gpt2"], tmp_path / "untied")
    weights = load_file(folder / "model.safetensors")
    (embeddings,) = (name for name in weights if name.endswith("wte.weight"))
    weights["lm_head.weight"] = weights[embeddings] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    base, config = base_of("gpt2", folder), ClientConfig.model_validate(FORMATS[format])
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(2):  # the second finds the file that the first has made
        shared = share_base(base, config)
        assert torch.equal(shared(input_ids=ids).logits, alone(base, config)(input_ids=ids).logits)


def test_tensors_begin_alike_with_and_without_a_cache(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL's product of one row has other bits where a weight begins elsewhere in its line."""

    def make() -> dict[str, torch.Tensor]:
        return {"a": torch.ones(7), "b": torch.ones(3, 5), "c": torch.ones(64)}

    shared = cache.share("x", {"content": 1}, make)
    own_cache.chmod(0o500)
    (own_cache.parent / "file").write_text("no folder")
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(own_cache.parent / "file"))
    private = cache.share("x", {"content": 1}, make)
    own_cache.chmod(0o700)
    for name, tensor in shared.items():
        assert torch.equal(private[name], tensor)
        assert private[name].data_ptr() % 64 == tensor.data_ptr() % 64
