"""What every section of an experiment is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

FULL_PRECISION = 32
"""The value of a `bits` key that means: not quantized, fp32."""


def bits_of(value: Any) -> Any:
    """The number that `full` stands for; any other value as it is."""
    return FULL_PRECISION if value == "full" else value


_INTEGER_BITS = Literal[2, 3, 4, 5, 6, 7, 8, 32]
Bits = Annotated[Literal["ternary", 2, 3, 4, 5, 6, 7, 8, 32], BeforeValidator(bits_of)]
"""Bits a parameter: "ternary" (log2 3), 2 to 8, or 32 (also written "full"): not quantized."""
BaseBits = Annotated[_INTEGER_BITS, BeforeValidator(bits_of)]

Codebook = Literal["nf", "nf-symmetric", "lloyd-max", "int"]
Scale = Literal["fp32", "fp16", "double"]
Block = Annotated[int, Field(ge=8, le=65536)]
Magnitude = Literal["absmax", "norm"]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
GpuShare = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Cpus = Annotated[float, Field(ge=0.001)]


class Section(BaseModel):
    """A frozen group of keys. Unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
