"""Codebooks: the ascending levels that a normalised weight ``w / max|block|`` is rounded to.

Sources: FedLPP (arXiv 2406.10976) for the use of NormalFloat-k and of the ternary code; QLoRA
(arXiv 2305.14314) for NormalFloat and its offset; Lloyd (1982) and Max (1960) for the optimum.
"""

from functools import cache
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from fedlpp_ray.quantization.lloyd_max import lloyd_max_levels

Bits = int | Literal["ternary"]
"""Bits per code: an int from 2 to 8, or ``"ternary"`` (log2 3 = 1.585 bits)."""

Kind = Literal["nf", "nf-symmetric", "lloyd-max", "int"]
"""How the levels are placed; see :func:`codebook`."""

OFFSET = 0.9677083
"""Largest probability of the NormalFloat quantiles, for every k: QLoRA's constant."""

MIN_BLOCK, MAX_BLOCK = 8, 65536


def check_codebook(bits: Bits, kind: Kind, block: int) -> None:
    """Raise ``ValueError`` unless ``codebook(bits, kind, block)`` exists."""
    is_int = isinstance(bits, int) and not isinstance(bits, bool)
    if bits != "ternary" and not (is_int and 2 <= int(bits) <= 8):
        hint = "; for about one bit use 'ternary'" if bits == 1 else ""
        raise ValueError(f"bits must be 'ternary' or an int from 2 to 8, got {bits!r}{hint}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    is_int = isinstance(block, int) and not isinstance(block, bool)
    if not (is_int and MIN_BLOCK <= block <= MAX_BLOCK):
        raise ValueError(f"block must be an int from {MIN_BLOCK} to {MAX_BLOCK}, got {block!r}")


def codebook(bits: Bits, kind: Kind = "nf", block: int = 64) -> Tensor:
    """Return the ascending float32 levels, shape ``(levels,)``, all within [-1, 1].

    ``"ternary"`` is {-1, 0, 1} whatever the kind. For k = 2..8 bits:

    * ``"nf"``: NormalFloat-k, 2^k levels: Gaussian quantiles, exact 0, -1 and 1; one more positive
      level than negative ones. At k = 4 it equals bitsandbytes' NF4 table bit for bit.
    * ``"nf-symmetric"``: NF-k's positive side, mirrored, and 0: 2^k + 1 levels. It does *not* fit
      in k bits: it is packed in k + 1 (k = 2: 2.67), and must be compared at that price.
    * ``"lloyd-max"``: 2^k levels of least squared error for Gaussian weights in blocks of ``block``
      (see :mod:`fedlpp_ray.quantization.lloyd_max`). It has no exact 0 and no exact -1 and 1.
    * ``"int"``: the symmetric uniform grid ``i / (2^(k-1) - 1)``, 2^k - 1 levels.

    ``block`` (weights per scale) only matters to ``"lloyd-max"``.

    Raises ``ValueError`` naming what is allowed.
    """
    check_codebook(bits, kind, block)
    return _levels(bits, kind, block).clone()


@cache
def _levels(bits: Bits, kind: Kind, block: int) -> Tensor:
    with torch.device("cpu"):  # also while a model is being built on another, or on "meta"
        if isinstance(bits, str):
            return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float32)
        half = 1 << bits - 1
        if kind == "int":
            return torch.arange(1 - half, half, dtype=torch.float32) / (half - 1)
        if kind == "lloyd-max":
            positive = lloyd_max_levels(half, block)
            return torch.cat([-positive.flip(0), positive])
        positive = _normal_quantiles(half)
        negative = positive if kind == "nf-symmetric" else _normal_quantiles(half - 1)
        levels = torch.cat([-negative, positive, positive.new_zeros(1)]).sort().values
        return levels / levels.max()


def _normal_quantiles(count: int) -> Tensor:
    """``count`` positive Gaussian quantiles of equally spaced probabilities from OFFSET to 1/2.

    The probabilities and the quantiles are rounded to float32, as in QLoRA's own code: that is
    what makes the 4-bit table equal to bitsandbytes' to the last bit.
    """
    top = torch.tensor(OFFSET, dtype=torch.float32).item()
    probabilities = torch.linspace(top, 0.5, count + 1, dtype=torch.float64)[:-1].float()
    quantiles = [NormalDist().inv_cdf(p) for p in probabilities.tolist()]
    return torch.tensor(quantiles, dtype=torch.float32)
