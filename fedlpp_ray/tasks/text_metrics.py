"""Metrics of generated text against one or more references for each example."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import zip_longest
from operator import or_
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.tasks.examples import TaskError
from fedlpp_ray.tasks.metrics import Metrics

Words = list[str]
_NIST_ORDER = 5
_BLEU_ORDER = 4


def text_metrics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Metrics:
    """BLEU, NIST-5, METEOR without synonyms, ROUGE-L, CIDEr-D, and number of examples.

    `bleu`, `meteor` and `rouge_l` are fractions, as accuracy is, where papers print percent.
    `nist` (bits, no upper bound) and `cider` (0 to 10) are on the scale that papers print.
    `meteor` is far above that of papers that ran METEOR 1.5: compare it within this project only.

    Words are what mteval-v13a cuts; BLEU minds case, the others do not, and METEOR, ROUGE-L and
    CIDEr-D drop punctuation. ROUGE-L knows the letters a to z and digits only. CIDEr-D weighs words
    by how few examples' references hold them: it differs between samples of one data set, and is 0
    for a single example.

    Args:
        outputs: (examples,); an empty one scores 0.
        references: (examples, one or more); the number may differ between examples.

    Raises:
        ValueError: there are no examples, or not as many outputs as lists of references, or an
            example has no reference or one without a letter or digit.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    _check(outputs, references)
    tokenize = Tokenizer13a()
    output_tokens = [_tokens(text, tokenize) for text in outputs]
    reference_tokens = [[_tokens(text, tokenize) for text in texts] for texts in references]
    output_words = [_without_punctuation(tokens) for tokens in output_tokens]
    reference_words = [[_without_punctuation(x) for x in tokens] for tokens in reference_tokens]
    return {
        "bleu": _bleu(outputs, references),
        "nist": _nist(output_tokens, reference_tokens),
        "meteor": fmean(_meteor(output_words, reference_words)),
        "rouge_l": fmean(_rouge_l(outputs, references)),
        "cider": _cider(output_words, reference_words),
        "examples": len(outputs),
    }


def bleu_addends(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """What each example adds to the counts that decide corpus BLEU.

    Args:
        outputs: (examples,).
        references: (examples, one or more).

    Returns:
        (examples, 10): the n-grams of one to four words that a reference has too, all of them, the
        words of the output, and those of the reference that is nearest to it in length.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(
        effective_order=True
    )  # of a score that is not used: or each sentence is a warning
    scored = (metric.sentence_score(x, list(y)) for x, y in zip(outputs, references, strict=True))
    found = [[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in scored]
    return np.array(found, dtype=np.float64)


def bleu_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corpus BLEU (...,) of sums (..., 10), as a fraction: sacrebleu's, with smoothing `exp`.

    The n-th order without a hit counts as 1 / 2^n of one (Chen and Cherry, 2014, method 3); without
    any hit, or n-gram of an order, BLEU is 0.
    """
    hits, made = sums[..., :_BLEU_ORDER], sums[..., _BLEU_ORDER : 2 * _BLEU_ORDER]
    written, wanted = sums[..., -2], sums[..., -1]
    none = hits == 0
    smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=-1), hits)
    defined = hits.any(-1) & made.all(-1)
    logs = np.log(np.where(np.expand_dims(defined, -1), smoothed / np.where(made == 0, 1, made), 1))
    short = np.minimum(0, 1 - wanted / np.where(written == 0, 1, written))
    found: NDArray[np.float64] = np.where(defined, np.exp(short + logs.mean(-1)), 0)
    return np.where(np.isnan(sums).any(-1), math.nan, found)


def meteor_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """METEOR of each example (examples,), whose mean is that of `text_metrics`."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()

    def words(text: str) -> Words:
        return _without_punctuation(_tokens(text, tokenize))

    return np.array(_meteor(list(map(words, outputs)), [list(map(words, x)) for x in references]))


def rouge_l_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """ROUGE-L of each example (examples,), whose mean is that of `text_metrics`."""
    return np.array(_rouge_l(outputs, references))


def check_text_metrics() -> None:
    """Refuse where the packages that `text_metrics` needs are not installed.

    Raises:
        TaskError: naming the missing ones and what to install.
    """
    needed = ("nltk", "pycocoevalcap", "rouge_score", "sacrebleu")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise TaskError(
            f"metrics of written text need {', '.join(missing)}: pip install "
            "'fedlpp_ray[generation]', or set generation.examples=0 to measure likelihood alone"
        )


def _check(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not outputs:
        raise ValueError("no outputs to measure")
    if len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} outputs, but references for {len(references)} examples")
    for number, texts in enumerate(references, 1):
        if isinstance(texts, str):  # which is a sequence of strings, its letters, to a type checker
            raise ValueError(f"the references of example {number} are one text, not a list")
        if not texts:
            raise ValueError(f"example {number} has no reference")
        if any(not any(map(str.isalnum, text)) for text in texts):
            raise ValueError(f"example {number} has a reference without a letter or digit")


def _tokens(text: str, tokenize: Callable[[str], str]) -> Words:
    return tokenize(text).lower().split()


def _without_punctuation(tokens: Words) -> Words:
    """As the COCO evaluation does before METEOR and CIDEr-D, but on mteval's tokens, not PTB's."""
    return [token for token in tokens if any(map(str.isalnum, token))]


def _bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu with its defaults (nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp), over 100."""
    from sacrebleu.metrics.bleu import BLEU

    streams = [list(stream) for stream in zip_longest(*references)]  # None: no such reference
    return float(BLEU().corpus_score(outputs, streams).score) / 100


def _nist(outputs: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Doddington (2002), equation 3, as mteval-v13a computes it.

    Not nltk's `corpus_nist`, which scores an output against its best reference alone and fails
    where no output has five words; mteval clips by all references and takes their mean length.
    """
    found = Counter(ngram for texts in references for text in texts for ngram in _ngrams(text))
    found[()] = sum(len(text) for texts in references for text in texts)
    gained, made = [0.0] * (_NIST_ORDER + 1), [0] * (_NIST_ORDER + 1)
    for output, texts in zip(outputs, references, strict=True):
        ngrams = Counter(_ngrams(output))
        known = reduce(or_, (Counter(_ngrams(text)) for text in texts))
        for ngram, count in ngrams.items():
            made[len(ngram)] += count
            if ngram in known:
                bits = math.log2(found[ngram[:-1]] / found[ngram])
                gained[len(ngram)] += bits * min(count, known[ngram])
    usual = sum(fmean(map(len, texts)) for texts in references)
    score = sum(bits / max(count, 1) for bits, count in zip(gained, made, strict=True))
    return score * _nist_penalty(made[1] / usual)


def _nist_penalty(ratio: float) -> float:
    """1 for outputs as long as the references or longer, 1/2 for two thirds of that, 0 for none."""
    if ratio <= 0:
        return 0.0
    return math.pow(0.5, math.log(min(ratio, 1.0), 1.5) ** 2)


def _ngrams(words: Words) -> Iterator[tuple[str, ...]]:
    for order in range(1, _NIST_ORDER + 1):
        yield from zip(*(words[start:] for start in range(order)), strict=False)


class _NoSynonyms:
    """In place of WordNet, which is a download."""

    def synsets(self, word: str) -> tuple[()]:
        """None, for any word."""
        return ()


def _meteor(outputs: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Of each example nltk's score: equal words, then equal stems (Lavie and Agarwal, 2007).

    The best reference counts. Without synonyms and paraphrases, and with the parameters of 2005
    (.9, 3, .5). The METEOR 1.5 of published E2E tables, a Java program, gives about half of it.
    """
    from nltk.translate.meteor_score import meteor_score

    none = _NoSynonyms()
    pairs = zip(outputs, references, strict=True)
    return [meteor_score(texts, output, wordnet=none) for output, texts in pairs]


def _rouge_l(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Of each example rouge-score's F1, without stemming; the best reference counts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(outputs, references, strict=True)
    return [scorer.score_multi(texts, output)["rougeL"].fmeasure for output, texts in pairs]


def _cider(outputs: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D (Vedantam et al., 2015, equation 9), which COCO's code and papers call CIDEr."""
    from pycocoevalcap.cider.cider import Cider

    wanted = {i: [" ".join(text) for text in texts] for i, texts in enumerate(references)}
    given = {i: [" ".join(output)] for i, output in enumerate(outputs)}
    return float(Cider().compute_score(wanted, given)[0])
