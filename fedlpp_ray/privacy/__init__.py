"""What is protected and what leaks: of the server's model, and of the clients' data."""

from fedlpp_ray.privacy.inversion import (
    Gradient,
    Inversion,
    Span,
    gradient_of_step,
    measure_inversion,
    row_space,
    span_distances,
    spans_of_a,
    spans_of_b,
    token_distances,
)
from fedlpp_ray.privacy.membership import (
    Losses,
    Membership,
    PrivacyError,
    loss_scores,
    match_labels,
    measure_membership,
    measure_scores,
    min_k_scores,
    reference_scores,
)
from fedlpp_ray.privacy.protection import Protection, measure_protection
from fedlpp_ray.privacy.uncertainty import (
    Interval,
    Scores,
    SeedMean,
    bootstrap_protection,
    mean_over_seeds,
)

__all__ = [
    "Gradient",
    "Interval",
    "Inversion",
    "Losses",
    "Membership",
    "PrivacyError",
    "Protection",
    "Scores",
    "SeedMean",
    "Span",
    "bootstrap_protection",
    "gradient_of_step",
    "loss_scores",
    "match_labels",
    "mean_over_seeds",
    "measure_inversion",
    "measure_membership",
    "measure_protection",
    "measure_scores",
    "min_k_scores",
    "reference_scores",
    "row_space",
    "span_distances",
    "spans_of_a",
    "spans_of_b",
    "token_distances",
]
