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
)
from fedlpp_ray.tasks.partition import Partition, partition, set_aside, share_out
from fedlpp_ray.tasks.registry import load_task
from fedlpp_ray.tasks.text_metrics import check_text_metrics, text_metrics
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
    "check_text_metrics",
    "classification_metrics",
    "collate",
    "encode",
    "epoch_order",
    "evaluation_batches",
    "load_auxiliary",
    "load_corpus",
    "load_task",
    "partition",
    "set_aside",
    "share_out",
    "text_metrics",
]
