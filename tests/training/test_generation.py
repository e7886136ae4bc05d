"""Writing and its evaluation against plain loops on a tiny model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    NoRepeatNGramLogitsProcessor,
)

from fedlpp_ray.config import Experiment, GenerationConfig
from fedlpp_ray.models import no_repeat
from fedlpp_ray.tasks import IGNORED, Prompts, Wording, text_metrics
from fedlpp_ray.training import (
    classification_evaluator,
    classification_scorer,
    generation_evaluator,
    generation_scorer,
    smoothed_loss,
    write,
)
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def next_scores(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return log_softmax(model(input_ids=torch.tensor([tokens])).logits[0, -1].double(), 0)


def greedy(model: Any, prompt: list[int], steps: int, stop: int, ngram: int) -> list[int]:
    """One token after the other, no padding, no cache."""
    text: list[int] = []
    for _ in range(steps):
        scores = next_scores(model, prompt + text)
        for token in range(len(scores)):
            new = [*text, token]
            runs = [tuple(new[i : i + ngram]) for i in range(len(new) - ngram + 1)]
            if ngram and len(new) >= ngram and runs[-1] in runs[:-1]:
                scores[token] = -math.inf
        token = int(scores.argmax())
        if token == stop:
            break
        text.append(token)
    return text


PROMPTS = [[5, 9, 7], [6, 5, 4, 8, 11, 12], [10], [9, 9]]


@pytest.mark.parametrize("ngram", [0, 1, 2])
def test_greedy_writing_in_padded_batches_is_a_plain_loop(model: Any, ngram: int) -> None:
    config = GenerationConfig(beams=1, no_repeat_ngram=ngram, max_new_tokens=8)
    options: dict[str, Any] = {"pad": 0, "stop": [3], "device": CPU}
    found = write(model, PROMPTS, config, batch_size=3, **options)
    assert found == [greedy(model, prompt, 8, 3, ngram) for prompt in PROMPTS]
    assert found == write(model, PROMPTS, config, batch_size=1, **options)


def test_a_run_of_the_prompt_may_be_copied_and_one_of_the_text_may_not() -> None:
    """With transformers' own rule, which counts the prompt, a name could not be copied."""
    scores = torch.zeros(1, 10)
    prompt = [5, 6, 7]
    copying = no_repeat(2, len(prompt))(torch.tensor([[*prompt, 5]]), scores.clone())
    assert copying.isfinite().all()
    assert NoRepeatNGramLogitsProcessor(2)(torch.tensor([[*prompt, 5]]), scores)[0, 6] == -math.inf
    again = no_repeat(2, len(prompt))(torch.tensor([[*prompt, 5, 6, 5]]), scores.clone())
    assert again[0].isfinite().tolist() == [token != 6 for token in range(10)]
    assert not no_repeat(0, 3)


@pytest.mark.parametrize("penalty", [0.0, 0.9, 3.0])
def test_a_full_beam_finds_the_best_of_all_texts(model: Any, penalty: float) -> None:
    """With as many beams as tokens, two tokens deep, the search is exhaustive."""
    words, stop, prompt = model.config.vocab_size, 3, PROMPTS[1]
    first = next_scores(model, prompt)
    scored: dict[tuple[int, ...], float] = {(stop,): first[stop].item()}
    for token in set(range(words)) - {stop}:
        second = next_scores(model, [*prompt, token])
        for other in range(words):
            total = (first[token] + second[other]).item()
            scored[token, other] = total / 2**penalty
    best = max(scored, key=lambda text: scored[text])
    config = GenerationConfig(
        beams=words, no_repeat_ngram=0, max_new_tokens=2, length_penalty=penalty
    )
    options: dict[str, Any] = {"pad": 0, "stop": [stop], "device": CPU, "batch_size": 1}
    (found,) = write(model, [prompt], config, **options)
    assert found == [token for token in best if token != stop]


def chain(table: Tensor) -> Any:
    """A model whose next word depends on the last one alone: row i of the table after word i."""
    words = len(table)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=words,
        intermediate_size=words,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # the layer adds nothing, and the norm multiplies by sqrt(words)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(words))
        model.lm_head.weight.copy_((table.log() / words**0.5).T)
    return model


@pytest.mark.parametrize(("penalty", "best"), [(0.0, []), (3.0, [1, 1, 1])])
def test_a_search_goes_on_while_a_longer_text_may_be_better(
    penalty: float, best: list[int]
) -> None:
    """Two texts have ended after two words, as many as there are beams; the best of all texts of
    four is longer where length is rewarded. `early_stopping=True` would stop there."""
    table = torch.tensor([[0.25] * 4, [0.01, 0.45, 0.04, 0.5], [0.01, 0.3, 0.39, 0.3], [0.25] * 4])
    model, stop = chain(table), 3
    assert torch.allclose(next_scores(model, [1]).exp().float(), table[1])
    scored = {}
    for count in range(1, 5):
        for text in itertools.product(range(4), repeat=count):
            if stop not in text[:-1] and (count == 4 or text[-1] == stop):
                steps = zip((1, *text), text, strict=False)
                scored[text] = sum(math.log(table[a, b]) for a, b in steps) / count**penalty
    found = max(scored, key=lambda text: scored[text])
    assert [token for token in found if token != stop] == best
    config = GenerationConfig(beams=2, no_repeat_ngram=0, max_new_tokens=4, length_penalty=penalty)
    options: dict[str, Any] = {"pad": 0, "stop": [stop], "device": CPU, "batch_size": 1}
    assert write(model, [[1]], config, **options) == [best]


def test_the_loss_is_that_of_target_tokens_given_all_before(model: Any, tokenizer: Any) -> None:
    wording = Wording(tokenizer, GenerationConfig(), 16)
    ((tokens, labels),) = wording.encode(Prompts(("the cat is",), (("near a dog",),), (0,)))
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits
    known = [i for i in range(len(tokens)) if labels[i] != IGNORED]
    by_hand = [-next_scores(model, tokens[:i].tolist())[tokens[i]].item() for i in known]
    found = smoothed_loss(logits[:, :-1], labels[None, 1:], 0.0)
    assert found.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    theirs = model(input_ids=tokens[None], labels=labels[None]).loss
    assert found.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    uniform = -log_softmax(logits, 1).mean()
    expected = 0.9 * cross_entropy(logits, labels) + 0.1 * uniform
    assert smoothed_loss(logits, labels, 0.1).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_evaluation_measures_likelihood_and_text(model: Any, tokenizer: Any) -> None:
    held_out = Prompts(
        ("the cat", "a river of", "two"), (("is near", "is a dog"), ("one",), ("many",)), (0, 0, 0)
    )
    values = {"generation.beams": 1, "generation.max_new_tokens": 5, "evaluation.batch_size": 2}
    experiment = generation_experiment(values)
    wording = Wording(tokenizer, experiment.generation, 16)
    found = generation_evaluator(held_out, wording, 0, experiment)(model, CPU)
    lost = []
    for tokens, labels in wording.encode(held_out):
        for i in range(len(tokens)):
            if labels[i] != IGNORED:
                lost.append(-next_scores(model, tokens[:i].tolist())[tokens[i]].item())
    assert found["loss"] == pytest.approx(sum(lost) / len(lost), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(lost) / len(lost)), rel=1e-5)
    assert found["log_likelihood"] == -found["loss"]
    texts = [
        tokenizer.decode(greedy(model, wording.prompt(prompt), 5, 3, 4), skip_special_tokens=True)
        for prompt in held_out.prompts
    ]
    written = text_metrics(texts, held_out.references)
    assert {key: found[key] for key in written if key != "examples"} == {
        key: value for key, value in written.items() if key != "examples"
    }
    assert found["utility"] == found["bleu"]
    assert found["examples"] == 3


@pytest.mark.parametrize("utility", ["bleu", "meteor", "rouge_l", "log_likelihood", "cider"])
def test_what_examples_add_makes_the_utility(model: Any, tokenizer: Any, utility: str) -> None:
    held_out = Prompts(
        ("the cat", "a river of", "two"), (("is near", "is a dog"), ("one",), ("many",)), (0, 0, 0)
    )
    values = {"evaluation.utility": utility, "generation.examples": 2}
    experiment = generation_experiment(values | {"generation.max_new_tokens": 5})
    wording = Wording(tokenizer, experiment.generation, 16)
    metrics, scores = generation_scorer(held_out, wording, 0, experiment)(model, CPU)
    assert metrics == generation_evaluator(held_out, wording, 0, experiment)(model, CPU)
    if utility == "cider":
        assert scores is None
        return
    assert scores is not None
    assert len(scores.weights) == (3 if utility == "log_likelihood" else 2)
    assert scores.utility == pytest.approx(metrics["utility"], abs=1e-6)


@pytest.mark.parametrize("utility", ["accuracy", "macro_f1"])
def test_what_examples_add_makes_the_utility_of_a_classifier(utility: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 4)
    plain = nn.Module()
    plain.forward = lambda **_: SimpleNamespace(logits=logits)  # type: ignore[method-assign]
    encoded = [(torch.tensor([1]), i % 3) for i in range(9)]
    experiment = Experiment().with_values({"evaluation.utility": utility})
    metrics, scores = classification_scorer(encoded, 0, experiment)(plain, CPU)
    assert scores is not None
    assert scores.utility == pytest.approx(metrics[utility], abs=1e-12)
    logits[0, 0] = math.nan
    metrics, scores = classification_scorer(encoded, 0, experiment)(plain, CPU)
    assert scores is not None
    assert math.isnan(scores.utility)


def test_without_examples_to_write_only_likelihood_is_measured(model: Any, tokenizer: Any) -> None:
    held_out = Prompts(("the cat",), (("is near",),), (0,))
    experiment = generation_experiment({"generation.examples": 0})
    wording = Wording(tokenizer, experiment.generation, 16)
    found = generation_evaluator(held_out, wording, 0, experiment)(model, CPU)
    assert set(found) == {"utility", "log_likelihood", "loss", "perplexity", "examples"}
    assert found["utility"] == found["log_likelihood"]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_generator_that_has_diverged_has_no_metrics(
    folder: Path, tokenizer: Any, beams: int
) -> None:
    broken = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    held_out = Prompts(("the cat", "two"), (("is near",), ("many",)), (0, 0))
    experiment = generation_experiment({"generation.beams": beams})
    wording = Wording(tokenizer, experiment.generation, 16)
    found = generation_evaluator(held_out, wording, 0, experiment)(broken, CPU)
    assert found.pop("examples") == 2
    assert {"utility", "bleu", "loss", "perplexity"} <= set(found)
    assert all(map(math.isnan, found.values()))


def test_a_classifier_that_has_diverged_has_no_metrics() -> None:
    """One logit that is not finite is enough: the largest of NaNs would be a class."""

    def model(logit: float) -> Any:
        logits = torch.tensor([[logit, 0.0], [0.0, 1.0]])
        plain = nn.Module()
        plain.forward = lambda **_: SimpleNamespace(logits=logits)  # type: ignore[method-assign]
        return plain

    encoded = [(torch.tensor([1]), 0), (torch.tensor([2]), 1)]
    measure = classification_evaluator(encoded, 0, Experiment())
    assert measure(model(3.0), CPU)["utility"] == 1.0
    for logit in (math.nan, math.inf):
        found = measure(model(logit), CPU)
        assert found.pop("examples") == 2
        assert {"utility", "accuracy", "loss"} <= set(found)
        assert all(map(math.isnan, found.values()))


def generation_experiment(values: dict[str, Any]) -> Experiment:
    task = {
        "task.name": "generation",
        "task.data": "x.csv",
        "task.prompt": "{x}",
        "task.target": "{y}",
    }
    return Experiment().with_values(task | values)


def test_more_beams_find_likelier_texts(model: Any) -> None:
    def mean_score(beams: int) -> float:
        config = GenerationConfig(
            beams=beams, no_repeat_ngram=0, max_new_tokens=5, length_penalty=0.0
        )
        texts = write(model, PROMPTS, config, pad=0, stop=[3], batch_size=2, device=CPU)
        total = 0.0
        for prompt, text in zip(PROMPTS, texts, strict=True):
            for i, token in enumerate([*text, 3][:5]):
                total += next_scores(model, prompt + text[:i])[token].item()
        return total / len(PROMPTS)

    assert mean_score(8) > mean_score(1)
