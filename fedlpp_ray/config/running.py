"""When models are measured, and where all runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlpp_ray.config.section import Cpus, GpuShare, Positive, PositiveFloat, Section

Utility = Literal[
    "accuracy", "macro_f1", "log_likelihood", "bleu", "nist", "meteor", "rouge_l", "cider"
]


class EvaluationConfig(Section):
    """When the models are measured."""

    server: bool = True
    """Evaluate the server's model. fedsa-lora leaves B at the clients, so it has none: false."""
    utility: Utility | None = None
    """The main metric, the U of protection; more is better. None: accuracy; of a generation task
    bleu, or log_likelihood where `generation.examples` is 0."""
    every: Positive = 1
    """Evaluate after every so many rounds; the last round is always evaluated."""
    batch_size: Positive = 64


class RuntimeConfig(Section):
    """Where the actors run. None of these keys changes a result, `threads` and GPUs excepted."""

    client_actors: Positive = 2
    """Client actors at most; each serves many clients, and no more start than a cohort has."""
    client_cpus: Cpus = 0.5
    """CPUs that one client actor reserves. Ray schedules by this number and does not enforce it."""
    client_gpus: GpuShare = 0.0
    """GPUs of one client actor: 0 (CPU), a share below 1 (its memory is capped), or 1."""
    server_cpus: Cpus = 0.5
    server_gpus: GpuShare = 0.0
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Torch threads in each actor. Fixed, because sums in another order give other bits."""
    start_timeout: PositiveFloat = 600.0
    """Seconds to wait for resources and actors before giving up with a message."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process that computes, set before it imports torch."""
        pools = ("OMP", "MKL", "OPENBLAS", "RAYON")
        return {f"{pool}_NUM_THREADS": str(self.threads) for pool in pools} | {
            # Threads that spin while they wait take the cores from the actors that work.
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            # cuBLAS is deterministic only with a fixed workspace, set before CUDA starts.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TOKENIZERS_PARALLELISM": "false",
        }
