"""Client-level differential privacy, and secure aggregation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedlpp_ray.config.section import Positive, PositiveFloat, Section

Fraction = Annotated[float, Field(gt=0, lt=1)]


class PrivacyConfig(Section):
    """DP-FedAvg (McMahan et al., 2018, arXiv 1710.06963), and the clip that adapts (Andrew et al.,
    2021, arXiv 1905.03871). Needs the extra `privacy`."""

    clip: PositiveFloat | None = None
    """C: every update is scaled down to this L2 norm over all of its tensors together. With
    `adaptive`, that of the first round. None: no differential privacy."""
    adaptive: bool = False
    """After every round C <- C exp(-adaptive_lr (b - quantile)), b the noised fraction of clients
    whose update was within C."""
    quantile: Fraction = 0.5
    """Share of the updates that the adaptive clip leaves as they are."""
    adaptive_lr: PositiveFloat = 0.2
    count_noise: PositiveFloat | None = None
    """Standard deviation of the noise on the number of clients within the adaptive clip. It takes
    some of the budget, so it is to be more than noise_multiplier / 2. None: cohort / 20."""
    noise_multiplier: Annotated[float, Field(ge=0)] = 1.0
    """z: the sum of a round's clipped updates gets Gaussian noise of standard deviation z C. 0:
    clipping alone, which guarantees nothing. Epsilon is between federations of which one client is
    another, where that sum differs by 2 C."""
    noise: Literal["server", "clients"] = "server"
    """Who adds it. `clients`: each a share, of standard deviation z C /
    sqrt(federation.min_updates), so that those of the fewest that make a round are enough."""
    delta: Fraction | None = None
    """None: 1 / federation.clients^1.1 (McMahan et al.)."""

    @model_validator(mode="after")
    def _clips(self) -> Self:
        if self.adaptive and self.clip is None:
            raise ValueError("dp.adaptive needs dp.clip, the clip of the first round")
        return self


class SecureConfig(Section):
    """Secure aggregation (Bonawitz et al., CCS 2017, section 4): of a round's updates the server
    learns the sum alone. Needs the extra `privacy`."""

    threshold: Positive | None = None
    """t: a round's sum is of t updates or more, and fewer than t clients that pool with the server
    all that they know do not open another's. More than half of the clients that are sampled, at
    most `federation.min_updates`. None: updates travel as they are."""
    clip: PositiveFloat = 1.0
    """Largest absolute value in an update: with a larger one its client drops out of the round;
    nothing is clipped. It is the range of the integers that travel, and so decides how fine they
    are."""
    bits: Literal[32, 64] = 64
    """Of these integers, mod 2^bits: an update's values times the client's weight, rounded to
    multiples of the smallest power of two with which no sum of a round overflows
    (`privacy.secure.Grid`). An update takes as many bytes with 32 as in fp32, and has a coarser
    grid than with 64."""
