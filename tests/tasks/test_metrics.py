"""Macro F1 of counts that examples add to, against scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from fedlpp_ray.tasks import macro_f1_addends, macro_f1_of_sums


def test_macro_f1_of_summed_counts_is_that_of_the_resampled_examples() -> None:
    """All resamples at once; in small ones classes are missing."""
    random = np.random.default_rng(0)
    predictions, labels = random.integers(0, 5, (2, 12))
    draws = random.integers(0, 12, (40, 6))
    addends = macro_f1_addends(predictions, labels, 7)
    found = macro_f1_of_sums(addends[draws].sum(1))
    for draw, f1 in zip(draws, found, strict=True):
        expected = f1_score(
            labels[draw],
            predictions[draw],
            labels=range(7),
            average="macro",
            zero_division=0,
        )
        assert f1 == pytest.approx(expected, abs=1e-12)
    assert math.isnan(macro_f1_of_sums(addends.sum(0) * math.nan))
