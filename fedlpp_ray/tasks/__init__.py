"""A task: text, labels, what is held out, how clients share it, and its metrics."""

from fedlpp_ray.tasks.auxiliary import load_auxiliary
from fedlpp_ray.tasks.batches import (
    IGNORED,
    Batch,
    Encoded,
    collate,
    encode,
    epoch_order,
    evaluation_batches,
)
from fedlpp_ray.tasks.corpus import Corpus, load_corpus
from fedlpp_ray.tasks.examples import Examples, Prompts, Task, TaskError
from fedlpp_ray.tasks.metrics import (
    MEASURES,
    TEXT_MEASURES,
    UTILITY,
    Metrics,
    classification_metrics,
    macro_f1_addends,
    macro_f1_of_sums,
)
from fedlpp_ray.tasks.partition import Partition, partition, set_aside, share_out
from fedlpp_ray.tasks.registry import load_task
from fedlpp_ray.tasks.text_metrics import (
    bleu_addends,
    bleu_of_sums,
    check_text_metrics,
    meteor_scores,
    rouge_l_scores,
    text_metrics,
)
from fedlpp_ray.tasks.tokens import Tokens
from fedlpp_ray.tasks.wording import Wording

__all__ = [
    "IGNORED",
    "MEASURES",
    "TEXT_MEASURES",
    "UTILITY",
    "Batch",
    "Corpus",
    "Encoded",
    "Examples",
    "Metrics",
    "Partition",
    "Prompts",
    "Task",
    "TaskError",
    "Tokens",
    "Wording",
    "bleu_addends",
    "bleu_of_sums",
    "check_text_metrics",
    "classification_metrics",
    "collate",
    "encode",
    "epoch_order",
    "evaluation_batches",
    "load_auxiliary",
    "load_corpus",
    "load_task",
    "macro_f1_addends",
    "macro_f1_of_sums",
    "meteor_scores",
    "partition",
    "rouge_l_scores",
    "set_aside",
    "share_out",
    "text_metrics",
]
