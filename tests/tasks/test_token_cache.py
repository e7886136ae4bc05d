"""Tokens mapped from the cache are those that the text gives, and are never another text's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlpp_ray.config import GenerationConfig, ModelConfig, TaskConfig
from fedlpp_ray.models import load_tokenizer, model_identity
from fedlpp_ray.tasks import (
    Corpus,
    Examples,
    Prompts,
    Tokens,
    Wording,
    collate,
    corpus,
    encode,
    evaluation_batches,
    load_corpus,
    load_task,
)
from fedlpp_ray.tasks import partition as share
from fedlpp_ray.tasks.tokens import pack
from tests import tiny

LENGTH = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(name=str(tiny.make_model(tmp_path_factory.mktemp("bert") / "model")))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(name=str(tiny.make_generator(tmp_path_factory.mktemp("llama") / "model")))


def rows(count: int = 60) -> list[dict[str, str]]:
    made = tiny.make_rows(count)
    return [row | {"second": made[-i]["text"], "who": f"u{i % 7}"} for i, row in enumerate(made)]


@pytest.fixture
def labelled(tmp_path: Path) -> TaskConfig:
    path = tiny.write_csv(tmp_path / "data.csv", rows())
    given = {"data": str(path), "held_out": 20, "max_length": LENGTH, "key_column": "who"}
    return TaskConfig.model_validate({"name": "classification"} | given)


@pytest.fixture
def written(tmp_path: Path) -> TaskConfig:
    path = tiny.write_json_lines(tmp_path / "data.jsonl", rows())
    given = {"data": str(path), "held_out": 10, "max_length": LENGTH, "key_column": "who"}
    templates = {"prompt": "{text}", "target": "{label} {second}"}
    return TaskConfig.model_validate({"name": "generation"} | given | templates)


def load(config: TaskConfig, model: ModelConfig, **wording: Any) -> Corpus:
    generation = GenerationConfig.model_validate(wording)
    return load_corpus(config, generation, lambda: load_tokenizer(model), model_identity(model))


def plain(examples: Any) -> list[tuple[list[int], Any]]:
    return [
        (ids.tolist(), label.tolist() if isinstance(label, Tensor) else label)
        for ids, label in examples
    ]


@pytest.mark.parametrize("pairs", [False, True])
def test_labelled_tokens_are_those_of_the_text(
    labelled: TaskConfig, model: ModelConfig, pairs: bool
) -> None:
    config = labelled.model_copy(update={"pair_column": "second" if pairs else None})
    task, tokenizer = load_task(config), load_tokenizer(model)
    assert isinstance(task.held_out, Examples)
    for _ in ("made", "found"):
        found = load(config, model)
        assert (found.classes, found.pad) == (3, tokenizer.pad_token_id)
        assert isinstance(found.held_out, Tokens)
        for ours, part in ((found.train, task.train), (found.held_out, task.held_out)):
            expected = encode(part, tokenizer, LENGTH)
            assert plain(ours) == plain(expected)
            assert ours.labels.tolist() == list(part.labels)
            for one, other in zip(
                evaluation_batches(ours, found.pad, 7),
                evaluation_batches(expected, found.pad, 7),
                strict=True,
            ):
                assert list(one) == list(other)
                assert all(torch.equal(one[key], other[key]) for key in one)
                assert {values.dtype for values in one.values()} == {torch.int64}


def test_written_tokens_are_those_of_the_text(written: TaskConfig, writer: ModelConfig) -> None:
    task, tokenizer = load_task(written), load_tokenizer(writer)
    wording = Wording(tokenizer, GenerationConfig(separator=" : "), LENGTH)
    for _ in ("made", "found"):
        found = load(written, writer, separator=" : ")
        assert found.classes is None
        assert found.held_out == task.held_out
        expected = wording.encode(task.train)
        assert plain(found.train) == plain(expected)
        assert torch.equal(collate(found.train, 0)["labels"], collate(expected, 0)["labels"])
        assert found.train.labels.tolist() == list(task.train.labels)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "natural"])
def test_they_are_shared_out_as_the_text_is(
    labelled: TaskConfig, model: ModelConfig, kind: str
) -> None:
    from fedlpp_ray.config import FederationConfig

    given = {"clients": 3, "min_examples": 2, "partition": kind}
    federation, task = FederationConfig.model_validate(given), load_task(labelled)
    ours = load(labelled, model).train
    expected = share(task.train.labels, federation, 5, task.train.keys)
    found = share(ours.labels, federation, 5, ours.keys)
    assert np.array_equal(found.order, expected.order)
    assert np.array_equal(found.offsets, expected.offsets)


def test_what_is_found_needs_neither_text_nor_tokenizer(
    labelled: TaskConfig, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(load(labelled, model).train)
    monkeypatch.setattr(corpus, "load_task", None)
    found = load_corpus(labelled, GenerationConfig(), lambda: None, model_identity(model))
    assert plain(found.train) == expected


def test_text_that_nothing_identifies_is_told_by_what_it_says(
    labelled: TaskConfig, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr(corpus, "data_identity", lambda config: None)
    expected = plain(load(labelled, model).train)
    assert plain(load(labelled, model).train) == expected
    assert len(list(own_cache.glob("tokens/*.safetensors"))) == 1
    tiny.write_csv(Path(str(labelled.data)), rows(70))
    assert len(load(labelled, model).train) == 50


@pytest.mark.parametrize(
    "change",
    [{"max_length": 6}, {"held_out": 10}, {"pair_column": "second"}, {"key_column": None}],
)
def test_other_settings_are_other_tokens(
    labelled: TaskConfig, model: ModelConfig, change: dict[str, Any], own_cache: Path
) -> None:
    load(labelled, model)
    config = labelled.model_copy(update=change)
    assert plain(load(config, model).train) == plain(
        encode(load_task(config).train, load_tokenizer(model), config.max_length)
    )
    assert len(list(own_cache.glob("tokens/*.safetensors"))) == 2


def test_a_changed_file_and_another_wording_are_other_tokens(
    written: TaskConfig, writer: ModelConfig
) -> None:
    before = load(written, writer)
    assert plain(load(written, writer, separator=" | ").train) != plain(before.train)
    assert plain(load(written, writer, max_new_tokens=2).train) != plain(before.train)
    path = Path(str(written.data))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(json.dumps(json.loads(x) | {"label": "seven"}) for x in lines))
    assert plain(load(written, writer).train) != plain(before.train)


def test_another_tokenizer_is_other_tokens(
    labelled: TaskConfig, model: ModelConfig, tmp_path: Path
) -> None:
    folder = tiny.make_model(tmp_path / "other")
    before = plain(load(labelled, ModelConfig(name=str(folder))).train)
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    file.write_text(json.dumps(told))
    after = plain(load(labelled, ModelConfig(name=str(folder))).train)
    assert before == plain(load(labelled, model).train) != after


def test_without_a_cache_the_tokens_are_the_same(
    labelled: TaskConfig,
    model: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = plain(load(labelled, model).train)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLPP_RAY_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert plain(load(labelled, model).train) == expected
    assert "shares no memory" in caplog.text
    unknown = load_corpus(labelled, GenerationConfig(), lambda: load_tokenizer(model), None)
    assert plain(unknown.train) == expected


def test_tokens_are_a_sequence() -> None:
    examples = [(torch.arange(n), n) for n in range(1, 6)]
    tokens = Tokens(pack([examples[:2], examples[2:]], range(1, 6), list("abcab")))
    assert plain(tokens) == plain(examples)
    assert plain(tokens[1:4:2]) == plain(examples[1:4:2])
    assert plain([tokens[-1]]) == plain(examples[-1:])
    taken = tokens.take([4, 0, 3])
    assert plain(taken.take([2, 0])) == plain([examples[3], examples[4]])
    assert (taken.labels.tolist(), (taken.keys if taken.keys is not None else []).tolist()) == (
        [5, 1, 4],
        [1, 0, 0],
    )
    with pytest.raises(IndexError):
        taken[3]
    assert plain(Tokens(pack([], []))) == []


def test_reading_an_example_leaves_the_arrays_as_they_are() -> None:
    prompts = Prompts(("p",), (("r",),), (0,))
    tokens = Tokens(pack([[(torch.tensor([1, 2]), torch.tensor([-100, 2]))]], prompts.labels))
    for _ in range(2):
        ids, labels = tokens[0]
        assert isinstance(labels, Tensor)
        assert (ids.tolist(), labels.tolist()) == ([1, 2], [-100, 2])
        ids.zero_()
        labels.zero_()
