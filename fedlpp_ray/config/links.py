"""What becomes of a message on its way down and up."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from fedlpp_ray.config.section import (
    FULL_PRECISION,
    Bits,
    Block,
    Codebook,
    Magnitude,
    NotNegative,
    Positive,
    Scale,
    Section,
    Share,
    bits_of,
)


def _uplink_bits(value: Any) -> Any:
    return 16 if value == "bf16" else bits_of(value)


class DownlinkConfig(Section):
    """How the global LoRA state S is quantized for the broadcast D = deq(quant(S))."""

    bits: Bits = 4
    kind: Codebook = "nf"
    block: Block = 64
    """Parameters that share one scale."""
    scale: Scale = "fp32"
    """How the scales travel: fp32, fp16, or 8 bits (`double`)."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    hysteresis: NotNegative = 0.0
    """A code changes only where its value is beyond the end of its cell by more than this, in
    halves of the gap between the levels there: at 1, where it passes the next level. 0: off."""
    hold_scales: bool = False
    """A block's scale stays while its largest magnitude is within a factor sqrt 2 of it. Meanwhile
    larger values are sent as the outermost levels."""
    dither: Literal["none", "round", "run", "subtractive-round", "subtractive-run"] = "none"
    """Where in the gap between two levels rounding changes over is drawn for each weight, by the
    server alone: anew for each message, or once for the run. `round` is stochastic rounding.
    `subtractive-`: from a seed that clients have too, and others not, so that they subtract what
    was added before rounding. For levels at equal distances (`kind` int, `bits` ternary)."""
    magnitude: Magnitude = "absmax"
    """What the scales that are sent keep of a block: its largest magnitude, or its L2 norm, which
    rounding to few bits enlarges otherwise."""
    factors: Literal["both", "A", "B"] = "both"
    """Which factor is quantized; the other is sent in fp32."""
    rotate: Literal["none", "round", "client"] = "none"
    """Send (B R, R^T A) with a random rotation R: the same product, other codes. R is drawn in
    every round, for all or for each client. The server turns the updates back."""
    perturbation: NotNegative = 0.0
    """Gaussian noise in each client's message, drawn for each client and round, of this size beside
    the root mean square of each tensor. Over the clients that are sampled for a round, with the
    server's weights, it sums to zero."""
    full_precision_head: bool = False
    """Send the classification head unquantized. That gives the head away: off by default."""
    every: Positive = 1
    """Make a broadcast in rounds 1, 1 + every, 1 + 2 every, ... In between clients train from the
    one in force; a client that has it downloads nothing. The updates of all these rounds start at
    the same point and add up: server.lr = 1 / every averages them."""
    server_mask: Share = 0.0
    """Share of the columns of A and of the head's weights that no client ever receives: FedQSN's
    p1 (arXiv 2508.18911). What is sent is multiplied by 1 / (1 - p1)."""
    client_mask: Share = 0.0
    """FedQSN's p2: share of the columns left that a client does not receive in a round, others for
    each client and round, so that each has a message of its own. Scaled likewise."""

    @model_validator(mode="after")
    def _own_messages_are_fresh(self) -> Self:
        if self.every > 1 and self.individual:
            raise ValueError(
                f"downlink.every = {self.every} keeps one broadcast in force for several rounds, "
                f"and {self.individual} gives every client another in every round; set "
                f"downlink.every=1, or do without {self.individual}"
            )
        return self

    @property
    def subtracts(self) -> bool:
        """Whether clients have the seed of the dither and subtract it."""
        return self.dither.startswith("subtractive")

    @property
    def lasting_dither(self) -> bool:
        """Whether it is drawn once for the run."""
        return self.dither in ("run", "subtractive-run")

    @property
    def individual(self) -> str:
        """What gives each client a message of its own, with its value; empty: nothing does."""
        found = {
            "downlink.rotate 'client'": self.rotate == "client",
            f"downlink.perturbation = {self.perturbation:g}": self.perturbation > 0,
            f"downlink.client_mask = {self.client_mask:g}": self.client_mask > 0,
        }
        return " and ".join(key for key, on in found.items() if on)

    def made_in(self, round: int) -> int:
        """The round that made the broadcast in force in a round; rounds count from 1."""
        return round - (round - 1) % self.every


class UplinkConfig(Section):
    """How a client's update travels back."""

    bits: Annotated[
        Literal["ternary", 2, 3, 4, 5, 6, 7, 8, 16, 32], BeforeValidator(_uplink_bits)
    ] = 32
    """As `downlink.bits`, or 16 (also written "bf16")."""
    kind: Codebook = "int"
    block: Block = 64
    scale: Scale = "fp32"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """`stochastic` with `kind: int` is unbiased, as in FedPAQ (arXiv 1909.13014)."""
    error_feedback: bool = False
    """A client adds what rounding took from its last update to its next (arXiv 1809.07599)."""

    @model_validator(mode="after")
    def _errors_exist(self) -> Self:
        if self.error_feedback and self.bits == FULL_PRECISION:
            raise ValueError("uplink.error_feedback needs uplink.bits below 32: fp32 is exact")
        return self
