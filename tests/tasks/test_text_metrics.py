"""Metrics of generated text, each against its reference implementation or a published example."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import sacrebleu
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer

from fedlpp_ray.tasks.text_metrics import (
    bleu_addends,
    bleu_of_sums,
    meteor_scores,
    rouge_l_scores,
    text_metrics,
)

OUTPUTS = [
    "The Punter is a cheap Italian restaurant near the river.",
    "Blue Spice serves Chinese food, and it has a customer rating of 3 out of 5.",
    "Aromi is a coffee shop with a low rating, in the city centre.",
    "For under 20 pounds, Cotto offers burgers. It is not family friendly.",
]
REFERENCES = [
    [
        "Near the river there is a cheap Italian restaurant, The Punter.",
        "The Punter is a low-priced restaurant by the river; it serves Italian food.",
        "An Italian restaurant near the river is called The Punter.",
    ],
    [
        "Blue Spice is a place for Chinese food. Customers rate it 3 out of 5.",
        "The customer rating of Blue Spice, which serves Chinese food, is 3 out of 5.",
        "Blue Spice has Chinese food and a rating of 3.",
    ],
    [
        "In the city centre is a coffee shop named Aromi with a low rating.",
        "Aromi is a coffee shop in the city centre, rated low.",
        "There is a low rated coffee shop, Aromi, in the city.",
    ],
    [
        "Cotto has burgers for less than 20 pounds and is not for families.",
        "Cotto, where a burger costs under 20 pounds, is not family friendly.",
        "Not a family friendly place, Cotto offers burgers for under 20 pounds.",
    ],
]
ONE_EACH = [texts[:1] for texts in REFERENCES]
UNEQUAL = [texts[:count] for texts, count in zip(REFERENCES, (1, 3, 2, 1), strict=True)]
SCORES = ("bleu", "nist", "meteor", "rouge_l", "cider")


def tokens(text: str) -> list[str]:
    """What mteval-v13a makes of the sample, by a simpler rule: words with hyphens, and marks."""
    return re.findall(r"[\w-]+|[.,;]", text.lower())


def words(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())


# BLEU


def test_bleu_is_that_of_sacrebleu() -> None:
    streams = [[texts[i] for texts in REFERENCES] for i in range(3)]
    expected = sacrebleu.corpus_bleu(OUTPUTS, streams).score / 100
    assert text_metrics(OUTPUTS, REFERENCES)["bleu"] == pytest.approx(expected, abs=1e-12)


def test_bleu_of_unequal_references_is_that_of_references_said_again() -> None:
    """A reference that is there twice adds neither a match nor another length."""
    streams = [[texts[i % len(texts)] for texts in UNEQUAL] for i in range(3)]
    expected = sacrebleu.corpus_bleu(OUTPUTS, streams).score / 100
    assert text_metrics(OUTPUTS, UNEQUAL)["bleu"] == pytest.approx(expected, abs=1e-12)


# NIST


def test_nist_is_that_of_nltk_where_each_example_has_one_reference() -> None:
    expected = corpus_nist([[tokens(x)] for (x,) in ONE_EACH], list(map(tokens, OUTPUTS)))
    assert text_metrics(OUTPUTS, ONE_EACH)["nist"] == pytest.approx(expected, abs=1e-10)


def test_nist_of_several_references_is_that_of_mteval() -> None:
    """6.456859342983: the functions of mteval-v13a.pl, run by Perl on this sample."""
    assert text_metrics(OUTPUTS, REFERENCES)["nist"] == pytest.approx(6.456859342983, abs=1e-10)


def test_nist_counts_runs_of_up_to_five_words() -> None:
    """After 'd', 'e' follows twice in three, after that 'f' once in two; 17 words in all."""
    references = ["a b c d e f", "a b c d g", "a b c d e h"]
    single = 4 * math.log2(17 / 3) + math.log2(17 / 2) + math.log2(17 / 1)
    longer = math.log2(3 / 2) + math.log2(2 / 1)  # of each length from two to five
    expected = single / 6 + longer * (1 / 5 + 1 / 4 + 1 / 3 + 1 / 2)
    metrics = text_metrics(["a b c d e f"], [references])
    assert metrics["nist"] == pytest.approx(expected, abs=1e-12)


def test_nist_of_unequal_references_by_hand() -> None:
    """Seven words in all; 'a' twice, 'b' once, 'a b' once; two words where four are usual."""
    score = (math.log2(7 / 2) + math.log2(7 / 1)) / 2 + math.log2(2 / 1) / 1
    penalty = math.exp(math.log(0.5) * (math.log(2 / 4) / math.log(1.5)) ** 2)
    metrics = text_metrics(["a b", ""], [["a b", "a c d e"], ["f"]])
    assert metrics["nist"] == pytest.approx(score * penalty, abs=1e-12)


# METEOR


def test_meteor_is_what_the_documentation_of_nltk_prints() -> None:
    output = "It is a guide to action which ensures that the military always obeys the commands"
    reference = "It is a guide to action that ensures that the military will forever heed Party"
    metrics = text_metrics([output + " of the party"], [[reference + " commands"]])
    assert metrics["meteor"] == pytest.approx(0.6944, abs=5e-5)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("on the mat sat the cat", 1 - 0.5 * (6 / 6) ** 3),  # 'the' is not aligned with its chunk
        ("the cat sat on the mat", 1 - 0.5 * (1 / 6) ** 3),
        ("the cat was sat on the mat", (10 * 6 / 7) / (1 + 9 * 6 / 7) * (1 - 0.5 * (2 / 6) ** 3)),
    ],
)
def test_meteor_by_hand(output: str, expected: float) -> None:
    metrics = text_metrics([output], [["the cat sat on the mat"]])
    assert metrics["meteor"] == pytest.approx(expected, abs=1e-12)


def test_meteor_is_the_mean_of_the_best_references() -> None:
    """Lavie and Agarwal's formula; aligned by hand."""

    def score(matches: int, chunks: int, output: int, reference: int) -> float:
        precision, recall = matches / output, matches / reference
        f_mean = 10 * precision * recall / (recall + 9 * precision)
        return f_mean * (1 - 0.5 * (chunks / matches) ** 3)

    outputs = ["He likes trains, old trains.", "A red bus."]
    references = [["A train.", "He liked old trains."], ["A bus is red.", "The blue car stops."]]
    expected = (score(4, 2, 5, 4) + score(3, 3, 3, 4)) / 2
    # he-he and likes-liked by stem, old-old and trains-trains; a-a, red-red, bus-bus, all apart
    assert text_metrics(outputs, references)["meteor"] == pytest.approx(expected, abs=1e-12)


def test_meteor_knows_no_synonyms() -> None:
    assert text_metrics(["big cars"], [["large automobiles"]])["meteor"] == 0


# ROUGE-L


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    if not a or not b:
        return 0
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            same = table[i - 1, j - 1] + 1
            table[i, j] = same if x == y else max(table[i - 1, j], table[i, j - 1])
    return int(table[-1, -1])


@pytest.mark.parametrize("references", [ONE_EACH, REFERENCES, UNEQUAL])
def test_rouge_l_is_that_of_rouge_score_and_of_its_definition(references: list[list[str]]) -> None:
    scorer = RougeScorer(["rougeL"])
    library, defined = [], []
    for output, texts in zip(OUTPUTS, references, strict=True):
        library.append(max(scorer.score(text, output)["rougeL"].fmeasure for text in texts))
        cut = [re.findall("[a-z0-9]+", text.lower()) for text in (output, *texts)]
        shares = [2 * longest_common(cut[0], x) / (len(cut[0]) + len(x)) for x in cut[1:]]
        defined.append(max(shares))  # 2PR/(P+R)
    found = text_metrics(OUTPUTS, references)["rouge_l"]
    assert found == pytest.approx(np.mean(library), abs=1e-12)
    assert found == pytest.approx(np.mean(defined), abs=1e-12)


# CIDEr


def ngram_counts(text: str, order: int) -> Counter[tuple[str, ...]]:
    cut = words(text)
    return Counter(tuple(cut[i : i + order]) for i in range(len(cut) - order + 1))


def vector(text: str, ngrams: Sequence[tuple[str, ...]]) -> np.ndarray:
    counts = ngram_counts(text, len(ngrams[0]))
    return np.array([counts[ngram] for ngram in ngrams], dtype=float)


def cider_d(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Equation 9 of the paper, with vectors over the whole vocabulary; sigma 6, orders 1 to 4."""
    scores = np.zeros((len(outputs), 4))
    for order in range(1, 5):
        held = [set().union(*(ngram_counts(x, order) for x in texts)) for texts in references]
        seen = Counter(ngram for ngrams in held for ngram in ngrams)
        every = sorted({*seen, *(ngram for text in outputs for ngram in ngram_counts(text, order))})
        rarity = np.array([math.log(len(outputs) / max(seen[ngram], 1)) for ngram in every])
        for row, (output, texts) in enumerate(zip(outputs, references, strict=True)):
            mine = vector(output, every) * rarity
            for text in texts:
                theirs = vector(text, every) * rarity
                norms = np.linalg.norm(mine) * np.linalg.norm(theirs)
                alike = np.minimum(mine, theirs) @ theirs / norms if norms else 0.0
                apart = len(words(output)) - len(words(text))
                scores[row, order - 1] += alike * math.exp(-(apart**2) / 72) / len(texts)
    return 10 * float(scores.mean())


@pytest.mark.parametrize("references", [ONE_EACH, REFERENCES, UNEQUAL])
def test_cider_is_that_of_the_paper(references: list[list[str]]) -> None:
    found = text_metrics(OUTPUTS, references)["cider"]
    assert found == pytest.approx(cider_d(OUTPUTS, references), abs=1e-10)


def test_cider_is_that_of_coco_with_its_own_tokenizer() -> None:
    """4.076746015801: pycocoevalcap 1.2 with Stanford's PTB tokenizer (Java) on this sample."""
    assert text_metrics(OUTPUTS, REFERENCES)["cider"] == pytest.approx(4.076746015801, abs=1e-10)


# All of them


def test_perfect_outputs_score_the_most_there_is() -> None:
    outputs = [texts[0] for texts in REFERENCES]
    best = text_metrics(outputs, ONE_EACH)
    assert best["examples"] == 4
    assert best["bleu"] == pytest.approx(1, abs=1e-12)
    assert best["rouge_l"] == pytest.approx(1, abs=1e-12)
    assert best["cider"] == pytest.approx(10, abs=1e-12)
    one_chunk = np.mean([1 - 0.5 / len(words(text)) ** 3 for text in outputs])
    assert best["meteor"] == pytest.approx(one_chunk, abs=1e-12)
    assert best["nist"] == pytest.approx(
        corpus_nist([[tokens(text)] for text in outputs], list(map(tokens, outputs))), abs=1e-10
    )
    for i in range(4):
        shorter = [*outputs]
        shorter[i] = " ".join(outputs[i].split()[1:])
        worse = text_metrics(shorter, ONE_EACH)
        assert all(worse[name] < best[name] for name in SCORES)


@pytest.mark.parametrize("references", [REFERENCES, UNEQUAL])
def test_the_order_of_the_examples_and_of_their_references_says_nothing(
    references: list[list[str]],
) -> None:
    order = [2, 0, 3, 1]
    moved = text_metrics([OUTPUTS[i] for i in order], [references[i][::-1] for i in order])
    assert moved == pytest.approx(text_metrics(OUTPUTS, references), abs=1e-12)


def test_outputs_belong_to_their_own_references() -> None:
    swapped = text_metrics(OUTPUTS[::-1], REFERENCES)
    right = text_metrics(OUTPUTS, REFERENCES)
    assert all(swapped[name] < right[name] for name in SCORES)


@pytest.mark.parametrize("empty", ["", "  \n", "."])
def test_empty_outputs_score_nothing(empty: str) -> None:
    metrics = text_metrics([empty] * 4, UNEQUAL)
    for name in SCORES:
        most = 1e-6 if empty == "." and name in {"bleu", "nist"} else 0  # a full stop is a token
        assert 0 <= metrics[name] <= most, name


def test_one_empty_output_costs_its_share() -> None:
    whole, part = text_metrics(OUTPUTS, UNEQUAL), text_metrics([*OUTPUTS[:3], ""], UNEQUAL)
    assert part["examples"] == 4
    alone = text_metrics(OUTPUTS[3:], UNEQUAL[3:])
    for name in ("meteor", "rouge_l"):  # means over examples
        assert part[name] == pytest.approx(whole[name] - alone[name] / 4, abs=1e-12)
    assert all(0 < part[name] < whole[name] for name in SCORES)


def test_one_example_and_outputs_of_one_word_are_measured() -> None:
    metrics = text_metrics(["Yes"], [["Yes.", "No."]])
    assert metrics["meteor"] == 0.5
    assert metrics["rouge_l"] == 1
    assert metrics["cider"] == 0  # no word is rarer than another in a single example
    assert math.isfinite(metrics["bleu"])
    assert metrics["nist"] > 0


@pytest.mark.parametrize(
    ("outputs", "references", "says"),
    [
        ([], [], "no outputs to measure"),
        (["a"], [["a"], ["b"]], "1 outputs, but references for 2 examples"),
        (["a", "b"], [["a"], []], "example 2 has no reference"),
        (["a", "b"], [["a"], ["b", " - "]], "example 2 has a reference without a letter"),
        (["a", "b"], ["a", "b"], "the references of example 1 are one text, not a list"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    outputs: list[str], references: list[list[str]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        text_metrics(outputs, references)


# Example by example


@pytest.mark.parametrize(
    "outputs",
    [OUTPUTS, ["", *OUTPUTS[1:]], ["a the", "Blue", "", "of"], ["x y", "z", "", "v"], [""] * 4],
)
def test_bleu_of_summed_counts_is_that_of_the_resampled_corpus(outputs: list[str]) -> None:
    """All resamples at once; with orders without a hit, and without n-grams at all, among them."""
    draws = np.random.default_rng(0).integers(0, 4, (50, 4))
    addends = bleu_addends(outputs, UNEQUAL)
    found = bleu_of_sums(addends[draws].sum(1))
    for draw, bleu in zip(draws, found, strict=True):
        chosen = [outputs[i] for i in draw], [UNEQUAL[i] for i in draw]
        assert bleu == pytest.approx(text_metrics(*chosen)["bleu"], abs=1e-12)
    assert math.isnan(bleu_of_sums(addends.sum(0) * math.nan))


def test_scores_of_examples_have_the_corpus_as_their_mean() -> None:
    expected = text_metrics(OUTPUTS, UNEQUAL)
    assert meteor_scores(OUTPUTS, UNEQUAL).mean() == pytest.approx(expected["meteor"], abs=1e-12)
    assert rouge_l_scores(OUTPUTS, UNEQUAL).mean() == pytest.approx(expected["rouge_l"], abs=1e-12)
