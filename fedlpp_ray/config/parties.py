"""The clients, their federation, and the server."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedlpp_ray.config.section import (
    FULL_PRECISION,
    BaseBits,
    Block,
    Codebook,
    Positive,
    PositiveFloat,
    Scale,
    Section,
    Share,
)
from fedlpp_ray.config.zero import ZeroConfig


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
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Share = 0.0
    """Of sgd."""
    lr: PositiveFloat = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate from step to step; restarted every round."""
    warmup: Share = 0.0
    """Share of a round's steps over which the learning rate rises from 0."""
    round_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate from round to round."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """mu of FedProx's mu/2 ||w - D||^2 (arXiv 1812.06127); 0: none."""
    scaffold: bool = False
    """Correct the client's drift by SCAFFOLD's control variates (arXiv 1910.06378). The server's
    travels with the broadcast, through its quantizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    label_smoothing: Share = 0.0
    """Share of the training target's probability that is spread over all classes or tokens."""
    batch_size: Positive = 16
    group_by_length: bool = False
    """Batches of examples of about the same length, so that less is spent on padding (the option
    of this name in transformers). Which examples go together is then no longer chance alone."""
    compute: Literal["fp32", "bf16"] = "fp32"
    """In which format clients train and measure their model. `bf16`: what is frozen is stored in
    it, half the memory on a GPU, and activations and matrix products are; what is trained and
    travels, its gradients and the optimizer stay fp32. On a CPU it is each actor's own copy, while
    in fp32 the actors of a node share one. The server computes in fp32."""
    max_broadcast_norm: PositiveFloat = 1e4
    """A broadcast with a larger L2 norm is refused."""
    num_workers: Positive = 1
    """Ranks of one client actor, each with the CPUs and GPUs that `runtime` gives a client actor;
    they share a client's batches, and with `zero.stage` 3 its base."""
    zero: ZeroConfig = ZeroConfig()

    @model_validator(mode="after")
    def _variates_exist(self) -> Self:
        if self.scaffold and (self.optimizer, self.momentum) != ("sgd", 0.0):
            raise ValueError(
                "client.scaffold needs client.optimizer 'sgd' with client.momentum 0: only there "
                "is the way that a client went the sum of its gradients, as its variate must be"
            )
        return self

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
    client_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the clients that are sampled each round, without replacement. None: 0.2, unless
    `cohort` is given."""
    cohort: Positive | None = None
    """Number of clients that are sampled each round, instead of `client_fraction`."""
    sampling: Literal["uniform", "examples"] = "uniform"
    """`examples`: a client's chance grows with its number of examples. server.weighting 'uniform'
    goes with it; 'examples' would count them twice."""
    max_participations: Positive | None = None
    """A client that was sampled for so many rounds is not sampled again, whether its updates came
    in time or not: it has received as many broadcasts. None: no limit."""
    rounds: Positive = 10
    local_steps: Positive | None = None
    """Optimizer steps a sampled client makes each round. None: 10, unless `local_epochs` is
    given."""
    local_epochs: Positive | None = None
    """Passes a sampled client makes over its examples each round, instead of `local_steps`."""
    partition: Literal["iid", "dirichlet", "quantity", "natural"] = "iid"
    """`iid`: equal shares. `dirichlet`: uneven labels. `quantity`: uneven sizes. `natural`: a
    client has the examples of one value of `task.key_column`; the `clients` values with most
    examples take part, and all other examples are left out."""
    dirichlet_alpha: PositiveFloat = 0.5
    """Concentration over the clients of each label's share (`dirichlet`) or of the whole's
    (`quantity`); smaller is more uneven."""
    min_examples: Positive = 8
    """A client has at least so many training examples."""
    over_selection: Annotated[float, Field(ge=0)] = 0.0
    """So many more clients are sampled, as a share of the cohort. The round closes when as many
    updates as the cohort has clients are there; the others are late."""
    deadline: PositiveFloat | None = None
    """Simulated seconds (`simulation`) after which a round closes; who is not done is late."""
    min_updates: Positive = 1
    """A round to which fewer updates come in time is abandoned: the server's state stays as it was,
    and what came is discarded."""
    mode: Literal["synchronous", "fedbuff"] = "synchronous"
    """`fedbuff`: asynchronous, with a buffer (arXiv 2106.06639). As many clients as a cohort has
    train at any time, each from the broadcast that is newest when it starts; a round is `buffer`
    updates."""
    buffer: Positive | None = None
    """Updates of a round of fedbuff. None: half of the cohort, rounded up."""
    staleness_power: Annotated[float, Field(ge=0)] = 0.5
    """In fedbuff an update that misses t rounds counts 1 / (1 + t)^staleness_power."""

    @model_validator(mode="after")
    def _cohort_is_one_number(self) -> Self:
        if self.cohort is not None and self.client_fraction is not None:
            raise ValueError(
                f"federation.cohort = {self.cohort} and federation.client_fraction = "
                f"{self.client_fraction} both say how many clients are sampled; set one to null"
            )
        if self.cohort is not None and self.cohort > self.clients:
            raise ValueError(
                f"federation.cohort = {self.cohort} is more than federation.clients = "
                f"{self.clients}"
            )
        return self

    @model_validator(mode="after")
    def _training_is_one_number(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                f"federation.local_steps = {self.local_steps} and federation.local_epochs = "
                f"{self.local_epochs} both say how long a client trains; set one to null"
            )
        return self

    @model_validator(mode="after")
    def _rounds_can_close(self) -> Self:
        if self.mode == "synchronous":
            if self.buffer is not None:
                raise ValueError(
                    f"federation.buffer = {self.buffer} belongs to federation.mode 'fedbuff'; set "
                    "it to null"
                )
            most, name = self.cohort_size, "the cohort"
        else:
            most, name = self.updates, "federation.buffer"
            if self.over_selection or self.deadline is not None:
                raise ValueError(
                    "federation.mode 'fedbuff' waits for nobody: federation.over_selection and "
                    "federation.deadline belong to mode 'synchronous'"
                )
            if most > self.clients:
                raise ValueError(
                    f"federation.buffer = {most} is more than federation.clients = {self.clients}"
                )
        if self.min_updates > most:
            raise ValueError(
                f"federation.min_updates = {self.min_updates} is more than {name} of {most}"
            )
        return self

    @model_validator(mode="after")
    def _clients_are_enough(self) -> Self:
        cap, size = self.max_participations, self.sample_size
        if cap is None:
            return self
        if self.mode == "fedbuff":
            raise ValueError(
                f"federation.max_participations = {cap}: federation.mode 'fedbuff' samples no "
                "cohorts, a client starts whenever one is done; allowed: null"
            )
        spent = (self.rounds - 1) * size // cap if cap < self.rounds else 0
        if spent > self.clients - size:
            # Whoever is drawn, so many are left for the last round.
            least = min(self.rounds, (self.rounds - 1) * size // (self.clients - size + 1) + 1)
            raise ValueError(
                f"federation.max_participations = {cap} is too few for federation.rounds = "
                f"{self.rounds} of {size} sampled clients: after {self.rounds - 1} rounds up to "
                f"{min(spent, self.clients)} of federation.clients = {self.clients} have taken "
                f"part so often; allowed here: {least} and more"
            )
        return self

    @property
    def sample_size(self) -> int:
        """Clients sampled each round, those over the cohort's size included."""
        return min(self.clients, math.ceil(self.cohort_size * (1 + self.over_selection)))

    @property
    def updates(self) -> int:
        """Updates that close a round: the cohort's, or the buffer's."""
        if self.mode == "synchronous":
            return self.cohort_size
        return math.ceil(self.cohort_size / 2) if self.buffer is None else self.buffer

    def steps(self, examples: int, batch_size: int) -> int:
        """Optimizer steps that a client with so many examples makes in a round."""
        if self.local_epochs is None:
            return 10 if self.local_steps is None else self.local_steps
        return self.local_epochs * math.ceil(examples / batch_size)

    @property
    def cohort_size(self) -> int:
        """Clients sampled each round; a fraction is rounded to the nearest, at least one."""
        if self.cohort is not None:
            return self.cohort
        fraction = 0.2 if self.client_fraction is None else self.client_fraction
        return max(1, round(self.clients * fraction))


class ServerConfig(Section):
    """How the returns become the next state S."""

    aggregation: str = "fedit"
    """A method of `fedlpp_ray.aggregation.METHODS`: fedit, ffa-lora, rolora, fedsa-lora, flora,
    fedex-lora, flexlora, hetlora, lora-fair; or package.module:NAME, one of your own."""
    send_residual: bool = False
    """Send what flora and fedex-lora write into the base, quantized like all else. That gives it
    away; without it a client trains on another base than the server evaluates."""
    optimizer: Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = "fedavg"
    """How far to step along the mean return (FedOpt, arXiv 2003.00295)."""
    momentum: Share = 0.9
    """Of fedavgm."""
    beta1: Share = 0.9
    beta2: Share = 0.99
    """Decay of the moments of fedadam and fedyogi."""
    tau: PositiveFloat = 1e-3
    """Adaptivity of fedadagrad, fedadam and fedyogi; smaller is more adaptive."""
    rule: Literal["residual", "replace", "pull"] = "residual"
    """residual: S + lr (K - D). replace: D + lr (K - D). pull: S + lr (K - S)."""
    robust: Literal["none", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median"] = (
        "none"
    )
    """What K - D is in the place of the mean of the updates, against clients that attack: a rule of
    `fedlpp_ray.aggregation.ROBUST`. The server then keeps a round's updates until it ends."""
    byzantine: Annotated[int, Field(ge=0)] = 0
    """f, the most attackers among the updates of a round, for `robust`. trimmed-mean leaves out f
    values at each end, krum and multi-krum f updates; for both medians it is a limit alone. The
    fewest updates, `federation.min_updates`, are 2 f + 1, with krum and multi-krum 2 f + 3."""
    lr: PositiveFloat = 1.0
    weighting: Literal["examples", "uniform"] = "examples"
    examples: Annotated[int, Field(ge=0)] = 0
    """So many training examples are the server's own and no client's, whatever the seed."""
    max_update_norm: PositiveFloat = 1e3
    """An update with a larger L2 norm, without what its client adds for `dp`, is refused; with
    `secure.threshold` a mean is."""
    tune_steps: Annotated[int, Field(ge=0)] = 0
    """Steps that the server makes after every round, with its full model, on its own examples
    (`server.examples`). Optimizer and batches are as the clients' are, at a constant rate."""
    tune_lr: PositiveFloat = 1e-4
    """Learning rate of these."""
    final_average: Annotated[int, Field(ge=0)] = 0
    """Above 1: after the last round the server makes a final model that no client receives anything
    of, the mean of its states after so many last rounds (iterate averaging, Polyak and Juditsky
    1992; SWA, arXiv 1803.05407). The rounds are as they are without."""
    final_tune_steps: Annotated[int, Field(ge=0)] = 0
    """Steps that the server trains its final model, after averaging, on its own examples
    (`server.examples`). Optimizer and batches are as the clients' are, at a constant rate."""
    final_tune_lr: PositiveFloat = 1e-4
    """Learning rate of these."""
    base_correction: Annotated[int, Field(ge=0)] = 0
    """k: the server's model is W0 + R + (alpha/r) B A, with R the best approximation of rank k of
    what quantizing took from a client's base, W^ - W0, in every layer that is quantized there: the
    base that B and A were trained on (as the residue of LoftQ, arXiv 2310.08659). R is never sent,
    and `tune_steps` trains without it."""
    num_workers: Positive = 1
    """Ranks of the server, each with the CPUs and GPUs that `runtime` gives the server; they share
    its batches, and with `zero.stage` 3 its model."""
    zero: ZeroConfig = ZeroConfig()

    @property
    def makes_final(self) -> bool:
        """Whether there is a final model, which is never broadcast."""
        return self.final_average > 1 or self.final_tune_steps > 0
