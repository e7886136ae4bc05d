"""Membership inference: its scores, and how well they tell members, against sklearn and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from fedlpp_ray.privacy import (
    MemberScores,
    Membership,
    PrivacyError,
    loss_scores,
    match_labels,
    measure_scores,
    membership_scores,
    min_k_scores,
    pool_scores,
    reference_scores,
)

Losses = list[np.ndarray]


def measured(
    members: Losses, others: Losses, members_before: Losses, others_before: Losses
) -> dict[str, Membership]:
    references = {"reference": (members_before, others_before)}
    found = membership_scores((members, others), references)
    return {name: measure_scores(*sides) for name, sides in found.items()}


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


@pytest.mark.parametrize("decimals", [8, 1, 0], ids=["no ties", "some ties", "many ties"])
@pytest.mark.parametrize(("members", "others"), [(30, 100), (7, 250), (200, 1000), (50, 199)])
def test_auc_and_tpr_are_those_of_sklearn(members: int, others: int, decimals: int) -> None:
    rng = np.random.default_rng(members + others)
    ours = rng.normal(1.0, 1.0, members).round(decimals)
    theirs = rng.normal(0.0, 1.0, others).round(decimals)
    truth = np.repeat([1, 0], [members, others])
    scores = np.concatenate([ours, theirs])
    found = measure_scores(ours, theirs)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert found.tpr == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-12)
    assert (found.members, found.non_members) == (members, others)
    assert found.reason is None


@pytest.mark.parametrize(
    ("members", "others", "auc"),
    [
        (array(2, 3), array(0, 1), 1.0),
        (array(0, 1), array(2, 3), 0.0),
        (array(1, 1, 1), array(1, 1), 0.5),
        (array(2), array(1, 2, 3), 0.5),
        (array(2, 3), array(1, 2, 3), (1.5 + 2.5) / 6),
    ],
)
def test_auc_by_hand_with_half_ties(members: np.ndarray, others: np.ndarray, auc: float) -> None:
    assert measure_scores(members, others).auc == auc


def test_one_percent_needs_a_hundred_non_members() -> None:
    few = measure_scores(np.arange(10.0), np.arange(99.0))
    assert few.tpr is None
    assert few.smallest_fpr == 1 / 99
    assert few.reason == "99 non-members; a false-positive rate of 1 % needs 100 or more"
    others = np.arange(200.0)  # two of them may be above the threshold, which is so 197
    enough = measure_scores(array(196.5, 197.0, 197.5, 500.0), others)
    assert enough.tpr == 0.5
    assert enough.smallest_fpr == 1 / 200


def test_the_interval_is_that_of_delong() -> None:
    """Their variance by the definition: structural components, pair by pair."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(0.7, 1, 12).round(1), rng.normal(0, 1, 15).round(1)
    kernel = np.array([[(a > b) + (a == b) / 2 for b in y] for a in x])
    variance = kernel.mean(1).var(ddof=1) / 12 + kernel.mean(0).var(ddof=1) / 15
    found = measure_scores(x, y)
    half = 1.959963984540054 * variance**0.5
    assert found.interval is not None
    assert found.interval == pytest.approx((found.auc - half, min(1, found.auc + half)))


def test_the_interval_covers_the_true_auc() -> None:
    """Of two unit normals 1 apart it is Phi(1 / sqrt 2) = 0.76025."""
    rng = np.random.default_rng(0)
    draws = [measure_scores(rng.normal(1, 1, 40), rng.normal(0, 1, 60)) for _ in range(400)]
    covered = sum(low < 0.76025 < high for low, high in (d.interval or (0, 0) for d in draws))
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize(
    ("members", "others"),
    [(array(2, 3), array(0, 1)), (array(1, 1), array(1, 1)), (array(1), array(0, 2))],
    ids=["separated", "tied", "one member"],
)
def test_there_is_no_interval_where_the_variance_says_nothing(
    members: np.ndarray, others: np.ndarray
) -> None:
    assert measure_scores(members, others).interval is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_has_diverged_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="1 of 2 members have no finite score"):
        measure_scores(array(0, bad), array(1))
    with pytest.raises(PrivacyError, match="1 of 1 non-members"):
        measure_scores(array(0), array(bad))
    with pytest.raises(PrivacyError, match="no non-members"):
        measure_scores(array(0), array())
    good, poisoned = [array(1, 2)], [array(1, bad)]
    for losses in itertools.product([good, poisoned], repeat=4):
        if any(part is poisoned for part in losses):
            with pytest.raises(PrivacyError, match="diverged"):
                measured(*losses)


def test_scores_by_hand() -> None:
    losses = [array(1, 5, 3, 4, 2), array(2.0), array(0, 0, 0, 0, 0, 9, 0, 0, 0, 7)]
    assert loss_scores(losses).tolist() == [-3, -2, -1.6]
    assert min_k_scores(losses).tolist() == [-5, -2, -8]
    assert min_k_scores(losses, 0.4).tolist() == [-4.5, -2, -4]
    assert min_k_scores(losses, 1.0) == pytest.approx(loss_scores(losses))
    before = [array(4, 4, 4, 4, 4), array(1.0), array(*[1.6] * 10)]
    assert reference_scores(losses, before) == pytest.approx([1, -1, 0])


def test_min_k_is_of_texts_with_several_targets() -> None:
    one, several = [array(1), array(2)], [array(1, 2), array(2, 1)]
    assert set(measured(one, one, one, one)) == {"loss", "reference"}
    found = measured(several, several, several, several)
    assert set(found) == {"loss", "reference", "min_k"}
    assert {each.auc for each in found.values()} == {0.5}


def test_a_reference_takes_away_that_some_texts_are_easier() -> None:
    """Members are harder texts, and learnt a little: the loss alone would tell the contrary."""
    rng = np.random.default_rng(0)
    hard, easy = rng.normal(5, 0.5, 50), rng.normal(3, 0.5, 50)
    after = [array(x - 0.2) for x in hard], [array(x + 0.0) for x in easy]
    before = [array(x) for x in hard], [array(x) for x in easy]
    found = measured(*after, *before)
    assert found["loss"].auc < 0.1
    assert found["reference"].auc == 1


def test_matching_gives_both_sides_the_same_shares_of_each_label() -> None:
    members, others = [0] * 6 + [1] * 2 + [2] * 3, [1] * 9 + [0] * 12 + [3] * 5
    first, second = match_labels(members, others, np.random.default_rng(0))
    ours, theirs = np.array(members)[first], np.array(others)[second]
    assert np.bincount(ours).tolist() == [6, 2]  # label 2 is held out nowhere
    assert np.bincount(theirs).tolist() == [12, 4]  # two for each member
    assert len(set(first)) == len(first)
    assert len(set(second)) == len(second)
    again = match_labels(members, others, np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(again, (first, second), strict=True))


def test_with_more_members_than_others_of_a_label_some_members_are_left_out() -> None:
    first, second = match_labels([0] * 10 + [1], [0] * 4 + [1] * 9, np.random.default_rng(0))
    assert (len(first), len(second)) == (5, 5)


def test_nothing_matches_where_no_label_is_common() -> None:
    first, second = match_labels([0, 0], [1], np.random.default_rng(0))
    assert (len(first), len(second)) == (0, 0)


def member_scores(
    members: np.ndarray, others: np.ndarray, labels: list[int], first: int = 0
) -> MemberScores:
    texts = np.arange(first, first + len(members)), np.arange(len(others))
    return MemberScores(members, others, *texts, np.array(labels))


def test_scores_of_one_text_are_one_cluster_of_the_interval() -> None:
    """Each score twice: to Obuchowski the same number of texts, to DeLong twice as many."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(0.7, 1, 12), rng.normal(0, 1, 15)
    once, twice = measure_scores(x, y), (np.repeat(x, 2), np.repeat(y, 2))
    texts = np.repeat(np.arange(12), 2), np.repeat(np.arange(15), 2)
    found = measure_scores(*twice, texts)
    assert found.auc == once.auc
    assert found.interval == pytest.approx(once.interval)
    narrow = measure_scores(*twice).interval
    assert narrow is not None
    assert once.interval is not None
    assert narrow[1] - narrow[0] < 0.8 * (once.interval[1] - once.interval[0])


def test_the_interval_of_clusters_covers_the_true_auc() -> None:
    """Ten scores a text, that share most of their variance; AUC as of two normals 1 apart."""
    rng, covered = np.random.default_rng(0), 0
    texts = np.repeat(np.arange(30), 10), np.repeat(np.arange(40), 10)
    for _ in range(400):
        x, y = (
            (rng.normal(0, 0.9**0.5, len(set(t)))[t] + rng.normal(0, 0.1**0.5, len(t)) + shift)
            for t, shift in zip(texts, (1, 0), strict=True)
        )
        low, high = measure_scores(x, y, texts).interval or (0, 0)
        covered += low < 0.76025 < high
    assert 0.91 < covered / 400 < 0.98


def test_one_percent_needs_a_hundred_different_non_members() -> None:
    texts = np.arange(10), np.arange(120) % 99
    found = measure_scores(np.arange(10.0), np.arange(120.0), texts)
    assert found.tpr is None
    assert found.reason == "99 non-members; a false-positive rate of 1 % needs 100 or more"


def test_pooled_updates_have_as_many_non_members_a_member() -> None:
    """Neither update tells members; one has lower scores and more non-members."""
    rng = np.random.default_rng(0)
    one = member_scores(rng.normal(3, 1, 60), rng.normal(3, 1, 60), [0] * 40 + [1] * 20)
    two = member_scores(rng.normal(0, 1, 60), rng.normal(0, 1, 240), [0] * 160 + [1] * 80, 60)
    found = pool_scores([one, two], np.random.default_rng(0))
    assert (len(found.members), len(found.others)) == (120, 120)
    assert np.bincount(found.labels).tolist() == [80, 40]
    assert found.measure().auc == pytest.approx(0.5, abs=0.05)
    mixed = np.concatenate([one.others, two.others])
    assert measure_scores(found.members, mixed).auc > 0.6
