"""Membership inference: can a model's losses tell what it was trained on from what it was not?

Every attack is a score, higher for a member, of one text's losses; how well it tells members is the
area under its ROC curve, and its true-positive rate where it hardly ever accuses a non-member
(Carlini et al., arXiv 2112.03570: an average over all thresholds hides that).

    loss        -l(x)                      Yeom et al., arXiv 1709.01604, with every threshold
    reference   l_reference(x) - l(x)      Carlini et al., arXiv 2012.07805 and 2112.03570;
                                           Mireshghallah et al., arXiv 2203.03929
    min_k       -(mean of the largest k % of the losses of the text's tokens)
                                           Min-K%, Shi et al., arXiv 2310.16789
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlpp_ray.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Losses = Sequence[Floats]
"""Of each text (targets,): the loss of each of its tokens, in nats; of a classified one, (1,)."""
Sides = tuple[Losses, Losses]
"""Of members, and of others, in the same order under every model."""

MIN_K = 0.2
"""The share of a text's tokens that Min-K% reads; 20 % is what its authors settle on."""
_NORMAL_975 = 1.959963984540054


class PrivacyError(UserError):
    """A probe cannot be made; the message says why and what is needed."""


@dataclass(frozen=True)
class Membership:
    """How well one score tells members from non-members.

    Attributes:
        members, non_members: How many of each.
        auc: Probability that a member scores above a non-member, ties counting half. 0.5: it
            tells nothing.
        interval: 95 % confidence of `auc` by DeLong et al. (1988), of texts with several scores
            each by Obuchowski (1997). None where that variance is 0 or undefined: all scores tie,
            they separate perfectly, or there is one text of a kind.
        tpr: Share of members that score above all but 1 % of the non-members; None where there are
            too few different ones of these.
        smallest_fpr: The lowest false-positive rate above 0 that there is with this many
            non-members.
        reason: Why there is no `tpr`, or None.
    """

    members: int
    non_members: int
    auc: float
    interval: tuple[float, float] | None
    tpr: float | None
    smallest_fpr: float
    reason: str | None


@dataclass(frozen=True)
class MemberScores:
    """One score of the texts that an update is asked about, or of those of several updates.

    Attributes:
        members: (members,) higher for what looks like a member.
        others: (non-members,).
        member_texts: (members,) a number for each text: its scores under several updates have one.
        other_texts: (non-members,) likewise, counted apart.
        labels: (non-members,) of each.
    """

    members: Floats
    others: Floats
    member_texts: Integers
    other_texts: Integers
    labels: Integers

    def measure(self) -> Membership:
        """As `measure_scores`."""
        return measure_scores(self.members, self.others, (self.member_texts, self.other_texts))


def loss_scores(losses: Losses) -> Floats:
    """(texts,) minus the mean loss of each text's tokens."""
    return np.array([-tokens.mean() for tokens in losses], np.float64)


def reference_scores(losses: Losses, reference: Losses) -> Floats:
    """(texts,) how much lower each text's mean loss is than under a reference model.

    Args:
        losses: Under the attacked model.
        reference: Of the same texts, under a model that has not seen them.
    """
    return loss_scores(losses) - loss_scores(reference)


def min_k_scores(losses: Losses, share: float = MIN_K) -> Floats:
    """(texts,) the mean log-likelihood of each text's least likely tokens.

    Args:
        losses: Of n tokens the max(1, floor(share n)) largest losses count, so that of a text with
            one token it is `loss_scores`.
        share: In (0, 1].
    """

    def score(tokens: Floats) -> float:
        return -float(np.sort(tokens)[-max(1, math.floor(share * len(tokens) + 1e-9)) :].mean())

    return np.array([score(tokens) for tokens in losses], np.float64)


def measure_scores(
    members: Floats, non_members: Floats, texts: tuple[Integers, Integers] | None = None
) -> Membership:
    """How well a score tells members from non-members.

    Args:
        members: (members,) scores, higher for what looks like a member.
        non_members: (non-members,).
        texts: Which text each of them is of, on both sides; None: each of another.

    Raises:
        PrivacyError: there are none of a kind, or a score is not finite.
    """
    ours, theirs = texts or (np.arange(len(members)), np.arange(len(non_members)))
    for what, scores in {"members": members, "non-members": non_members}.items():
        if not len(scores):
            raise PrivacyError(f"membership: there are no {what} to measure")
        if unknown := int((~np.isfinite(scores)).sum()):
            raise PrivacyError(
                f"membership: {unknown} of {len(scores)} {what} have no finite score; the model "
                "has diverged"
            )
    above, count = _above(members, non_members), len(non_members)
    below, different = _above(non_members, members), len(np.unique(theirs))
    auc = int(above.sum()) / (2 * len(members) * count)
    reason = f"{different} non-members; a false-positive rate of 1 % needs 100 or more"
    shares = (above / (2 * count), ours), (below / (2 * len(members)), theirs)
    return Membership(
        members=len(members),
        non_members=count,
        auc=auc,
        interval=_delong(auc, *shares),
        tpr=_tpr(members, non_members) if different >= 100 else None,
        smallest_fpr=1 / count,
        reason=None if different >= 100 else reason,
    )


def membership_scores(
    losses: Sides, references: Mapping[str, Sides]
) -> Mapping[str, tuple[Floats, Floats]]:
    """Every score by name: `loss`, each reference's, and `min_k` where a text has several tokens.

    Of texts with one target each, which are classified, Min-K% would be `loss` once more.

    Args:
        losses: Under the attacked model.
        references: By the score's name; of the same texts under a model that has not seen them, or
            not for as long.

    Returns:
        Of members (members,), and of others (non-members,).
    """
    members, others = losses
    found = {"loss": (loss_scores(members), loss_scores(others))}
    for name, (before, beside) in references.items():
        found[name] = reference_scores(members, before), reference_scores(others, beside)
    if any(len(tokens) > 1 for tokens in [*members, *others]):
        found["min_k"] = min_k_scores(members), min_k_scores(others)
    return found


def pool_scores(parts: Sequence[MemberScores], random: np.random.Generator) -> MemberScores:
    """One score of several updates as one, of an adversary with one threshold for all of them.

    Else a part with more non-members a member would pull these to its own level, and a score that
    told parts apart would pass for one that tells members: of every part and label as many are
    taken as the part with fewest has.

    Args:
        parts: At least one; in each every label has as many non-members a member (`match_labels`).
        random: Which are taken is drawn from it.
    """
    ratio = min(len(part.others) // len(part.members) for part in parts)
    taken = []
    for part in parts:
        each = len(part.others) // len(part.members)
        of_labels = [np.flatnonzero(part.labels == x) for x in np.unique(part.labels)]
        chosen = [random.permutation(x)[: len(x) // each * ratio] for x in of_labels]
        taken.append(np.sort(np.concatenate(chosen)))
    pairs = list(zip(parts, taken, strict=True))
    return MemberScores(
        members=np.concatenate([part.members for part in parts]),
        others=np.concatenate([part.others[x] for part, x in pairs]),
        member_texts=np.concatenate([part.member_texts for part in parts]),
        other_texts=np.concatenate([part.other_texts[x] for part, x in pairs]),
        labels=np.concatenate([part.labels[x] for part, x in pairs]),
    )


def match_labels(
    members: Sequence[int], non_members: Sequence[int], random: np.random.Generator
) -> tuple[Integers, Integers]:
    """Members and non-members with the same shares of each label.

    Else a score that told labels apart would pass for one that tells members: the labels of a
    client are seldom those of all. Of each label that both have, as many members are taken as
    there are non-members at most, and a whole number of non-members a member, the same for all
    labels and as large as they allow.

    Args:
        members: (members,) the label of each.
        non_members: (non-members,).
        random: Which are taken is drawn from it.

    Returns:
        Indices of the members and of the non-members taken, ascending; both are empty where no
        label is on both sides.
    """
    ours, theirs = np.asarray(members, np.int64), np.asarray(non_members, np.int64)
    common = np.intersect1d(ours, theirs)
    sizes = [(int((ours == label).sum()), int((theirs == label).sum())) for label in common]
    each = min((have // min(need, have) for need, have in sizes), default=0)
    taken: tuple[list[Integers], list[Integers]] = ([], [])
    for label, (need, have) in zip(common, sizes, strict=True):
        count = min(need, have)
        taken[0].append(random.permutation(np.flatnonzero(ours == label))[:count])
        taken[1].append(random.permutation(np.flatnonzero(theirs == label))[: each * count])
    first, second = (np.sort(np.concatenate([[], *part])).astype(np.int64) for part in taken)
    return first, second


def _above(scores: Floats, others: Floats) -> Integers:
    """(scores,) twice the number of `others` that each score is above, ties counting half."""
    ranked = np.sort(others)
    return np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")


def _delong(
    auc: float, members: tuple[Floats, Integers], non_members: tuple[Floats, Integers]
) -> tuple[float, float] | None:
    """DeLong, DeLong and Clarke-Pearson (1988), for one curve; of clusters, Obuchowski (1997).

    From the share of the other kind that each member, and each non-member, is above: V10, and
    1 - V01; and the text that each is of, its cluster. A text is of one kind.
    """
    if min(len(np.unique(texts)) for _, texts in (members, non_members)) < 2:
        return None
    variance = _variance(*members) + _variance(*non_members)
    if variance == 0:
        return None
    half = _NORMAL_975 * math.sqrt(variance)
    return max(0.0, auc - half), min(1.0, auc + half)


def _variance(values: Floats, texts: Integers) -> float:
    """Of the values' mean, where those of one text depend on each other."""
    if np.ptp(values) == 0:
        return 0.0
    _, cluster = np.unique(texts, return_inverse=True)
    sums = np.bincount(cluster, values - values.mean())
    return float(len(sums) / (len(sums) - 1) * np.square(sums).sum() / len(values) ** 2)


def _tpr(members: Floats, non_members: Floats) -> float:
    """Of `score > t`, with the lowest t that at most 1 % of the non-members are above."""
    count = len(non_members)
    threshold = np.sort(non_members)[count - 1 - count // 100]
    return float((members > threshold).mean())
