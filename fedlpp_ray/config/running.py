"""When models are measured, and where all runs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedlpp_ray.config.section import Cpus, GpuShare, Positive, PositiveFloat, Section, Share

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


class SimulationConfig(Section):
    """How fast and how reliable the clients are made out to be, on a clock that is only counted.

    Who is in time follows from the seed alone, so it is the same on any machine. A client that is
    late or drops out is not trained at all.
    """

    step_seconds: PositiveFloat = 1.0
    """Seconds that the median client needs for one local step."""
    speed_spread: Annotated[float, Field(ge=0)] = 0.0
    """A client's speed is log-normal with this sigma, and the same in every round."""
    dropout: Share = 0.0
    """Chance that a sampled client never returns."""


class RuntimeConfig(Section):
    """Where the actors run. None of these keys changes a result, `threads` and GPUs excepted, and a
    `round_deadline` that strikes or `attempts` that run out."""

    client_actors: Positive = 2
    """Client actors at most; each serves many clients, and no more start than a cohort has."""
    min_client_actors: Positive | None = None
    """So many client actors are reserved before the run starts; the others join when the cluster
    has room for them, and leave with their node. None: all are reserved."""
    client_cpus: Cpus = 0.5
    """CPUs that one client actor reserves. Ray schedules by this number and does not enforce it."""
    client_gpus: GpuShare = 0.0
    """GPUs of one client actor: 0 (CPU), a share below 1 (its memory is capped), or 1."""
    server_cpus: Cpus = 0.5
    server_gpus: GpuShare = 0.0
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Torch threads in each actor. Fixed, because sums in another order give other bits."""
    start_timeout: PositiveFloat = 600.0
    """Seconds without any actor that works, at the start or later, before giving up with a message
    that names what is missing."""
    partial_sums_from: Positive = 8
    """From so many nodes on, updates are added up on the node of their client first, and the server
    receives one sum a node."""
    attempts: Positive = 3
    """How often a client's round is begun where its actor or node is lost; then it has failed."""
    round_deadline: PositiveFloat | None = None
    """Seconds of a real clock after which a round closes without the clients that are not done, and
    their actors are replaced. It depends on the machine, so it breaks reproducibility when it
    strikes; `federation.deadline` does not."""

    @model_validator(mode="after")
    def _reserved_are_among_all(self) -> Self:
        if self.min_client_actors is not None and self.min_client_actors > self.client_actors:
            raise ValueError(
                f"runtime.min_client_actors = {self.min_client_actors} is more than "
                f"runtime.client_actors = {self.client_actors}"
            )
        return self

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
