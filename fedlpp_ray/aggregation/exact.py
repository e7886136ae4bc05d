"""Sums of tensors that have the same bits whatever the order and however the terms are grouped.

Floating-point addition is not associative; addition of integers is. So each term v = w x, a
float64, is rounded once to a multiple of 2^-62 and added to a 114-bit integer, kept as two int64
limbs per element (the idea is that of Kulisch's long accumulator, cut to the range needed here):

    v ~ hi 2^-12 + lo 2^-62,  hi = round(2^12 v),  lo = round(2^62 (v - 2^-12 hi))

The remainder in the brackets is exact in float64. A term is off by at most 2^-63, and by nothing
where its last bit is 2^-62 or above, that is where |v| >= 2^-10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fedlpp_ray.state import Schema, State

LIMIT = 2.0**50
"""No sum reaches it: 2^62 in units of the upper limb."""
RESOLUTION = 2.0**-62
_HI = 2.0**-12
_CARRY = 2**50
"""Units of the lower limb in one of the upper limb."""
_BETWEEN_CARRIES = 2**12
"""Each term adds at most 2^49 to a lower limb, which carried has at most 2^49 itself."""
_CHUNK = 2**15
"""Elements at a time, so that the float64 scratch stays in a core's cache."""
_WEIGHT = "weight"

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class ExactSum:
    """sum_i w_i x_i over states of one schema, in 16 bytes an element.

    Args:
        schema: Names and shapes.
        terms: The most terms that will be added. A term of LIMIT / terms or above is refused, so no
            sum overflows, and whether a term is refused depends on that term alone.

    Attributes:
        count: Number of terms so far.
    """

    def __init__(self, schema: Schema, terms: int) -> None:
        self.count = 0
        self._schema, self._terms = dict(schema), terms
        self._uncarried = 0
        ends = list(accumulate(math.prod(shape) for shape in schema.values()))
        runs = [slice(start, end) for start, end in pairwise([0, *ends])]
        self._runs = dict(zip(schema, runs, strict=True))
        size = ends[-1] if ends else 0
        self._hi, self._lo = (
            torch.zeros(size, dtype=torch.int64),
            torch.zeros(size, dtype=torch.int64),
        )

    def check(self, term: State, weight: float = 1.0) -> None:
        """Refuse what `add` would refuse.

        Raises:
            OverflowError: an element of w x is not finite, or LIMIT / terms or above.
            ValueError: other names or shapes than the schema's, or a term too many.
        """
        if {name: tuple(x.shape) for name, x in term.items()} != self._schema:
            raise ValueError("the term's names and shapes are not those of the sum")
        if self.count == self._terms:
            raise ValueError(f"a sum of {self._terms} terms cannot take another")
        limit = LIMIT / self._terms
        for name, x in term.items():
            if x.numel():
                low, high = torch.aminmax(x)
                largest = abs(weight) * max(abs(float(low)), abs(float(high)))
                if not largest < limit:  # nor is NaN
                    raise OverflowError(f"{name}: weight times value reaches {largest:.4g}")

    def add(self, term: State, weight: float = 1.0) -> None:
        """Add w x.

        Args:
            term: x, fp32 or float64 tensors.
            weight: w. The product is taken in float64.

        Raises:
            OverflowError, ValueError: as `check`; the sum is unchanged.
        """
        self.check(term, weight)
        start = 0
        for values in _chunks([term[name] for name in self._schema]):
            run = slice(start, start + len(values))
            _accumulate(self._hi[run], self._lo[run], values.mul_(weight))
            start = run.stop
        self.count += 1
        self._uncarried += 1
        if self._uncarried == _BETWEEN_CARRIES:
            self._carry()

    def merge(self, other: ExactSum) -> None:
        """Add another sum of the same schema and number of terms; it is unchanged in value.

        Raises:
            ValueError: it is of another schema, or there would be more terms than planned.
        """
        if (self._schema, self._terms) != (other._schema, other._terms):
            raise ValueError("the two sums are of different schemas or numbers of terms")
        if self.count + other.count > self._terms:
            raise ValueError(f"more than {self._terms} terms")
        self._carry()
        other._carry()
        self._hi += other._hi
        self._lo += other._lo
        self.count += other.count
        self._uncarried = 1

    def value(self, name: str) -> Tensor:
        """The sum of one tensor, float64: the exact integer's limbs, added once."""
        self._carry()
        run = self._runs[name]
        total = self._hi[run].double().mul_(_HI).add_(self._lo[run], alpha=RESOLUTION)
        return total.view(self._schema[name])

    def values(self) -> State:
        """The sums of all tensors, float64."""
        return {name: self.value(name) for name in self._schema}

    @staticmethod
    def parts(schema: Schema) -> Parts:
        """Dtypes and shapes of what `tensors` gives."""
        limbs = {
            f"{limb}:{name}": (torch.int64, (math.prod(shape),))
            for name, shape in schema.items()
            for limb in ("hi", "lo")
        }
        return {"count": (torch.int64, ()), **limbs}

    def tensors(self) -> State:
        """The sum as int64 tensors, the same for equal sums; not copies."""
        self._carry()
        limbs = {f"hi:{name}": self._hi[run] for name, run in self._runs.items()}
        limbs |= {f"lo:{name}": self._lo[run] for name, run in self._runs.items()}
        return {"count": torch.tensor(self.count), **limbs}

    @classmethod
    def of(cls, schema: Schema, terms: int, tensors: State) -> ExactSum:
        """The inverse of `tensors`, whose dtypes and shapes are those of `parts`.

        Raises:
            ValueError: no sum of so many terms has these limbs.
        """
        found = cls(schema, terms)
        found.count = int(tensors["count"])
        if not 0 <= found.count <= terms:
            raise ValueError(f"{found.count} terms; at most {terms} are expected")
        most = int(LIMIT / _HI) // terms * found.count + found.count
        for limbs, prefix, bound in ((found._hi, "hi", most), (found._lo, "lo", _CARRY // 2)):
            for name, run in found._runs.items():
                limb = tensors[f"{prefix}:{name}"]
                if limb.numel() and not (-bound <= int(limb.min()) <= int(limb.max()) <= bound):
                    raise ValueError(f"{name}: out of the range of {found.count} terms")
                limbs[run] = limb
        return found

    def _carry(self) -> None:
        """Bring every lower limb into [-2^49, 2^49): then equal sums have equal limbs."""
        if not self._uncarried:
            return
        for hi, lo in zip(*(torch.split(x, _CHUNK) for x in (self._hi, self._lo)), strict=True):
            carried = (lo + _CARRY // 2) >> 50
            hi.add_(carried)
            lo.sub_(carried << 50)
        self._uncarried = 0


class ExactMean:
    """sum_i w_i x_i / sum_i w_i, the sum of the weights exact as well.

    Args:
        schema: Names and shapes.
        terms: As for `ExactSum`, for weights too.
    """

    def __init__(self, schema: Schema, terms: int) -> None:
        self._names = list(schema)
        self._sum = ExactSum(_with_weight(schema), terms)

    @property
    def count(self) -> int:
        """Number of terms so far."""
        return self._sum.count

    def check(self, term: State, weight: float) -> None:
        """Refuse what `add` would refuse, and raise as `ExactSum.check`."""
        self._sum.check(_weighed(term), weight)

    def add(self, term: State, weight: float) -> None:
        """Add a state x with weight w; raises as `ExactSum.add`."""
        self._sum.add(_weighed(term), weight)

    def merge(self, other: ExactMean) -> None:
        """Add the terms of another; raises as `ExactSum.merge`."""
        self._sum.merge(other._sum)

    def value(self, name: str) -> Tensor:
        """The mean of one tensor, float64. Not a number where the weights sum to 0."""
        return self._sum.value(f"x:{name}") / self._sum.value(_WEIGHT)

    def values(self) -> State:
        """The means of all tensors, float64."""
        return {name: self.value(name) for name in self._names}

    @staticmethod
    def parts(schema: Schema) -> Parts:
        """Dtypes and shapes of what `tensors` gives."""
        return ExactSum.parts(_with_weight(schema))

    def tensors(self) -> State:
        """Both sums as int64 tensors, the same for equal means; not copies."""
        return self._sum.tensors()

    @classmethod
    def of(cls, schema: Schema, terms: int, tensors: State) -> ExactMean:
        """The inverse of `tensors`; raises as `ExactSum.of`, and where weights sum to 0 or less."""
        found = cls(schema, terms)
        found._sum = ExactSum.of(_with_weight(schema), terms, tensors)
        if found.count and not found._sum.value(_WEIGHT) > 0:
            raise ValueError("the weights do not sum to a positive number")
        return found


def _with_weight(schema: Schema) -> Schema:
    return {_WEIGHT: (), **{f"x:{name}": shape for name, shape in schema.items()}}


def _weighed(term: State) -> State:
    return {_WEIGHT: torch.ones(()), **{f"x:{name}": x for name, x in term.items()}}


def _chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The values of all, one after the other, in float64; each chunk is overwritten by the next."""
    chunk, filled = torch.empty(_CHUNK, dtype=torch.float64), 0
    for tensor in tensors:
        left = tensor.detach().reshape(-1)
        while len(left):
            part, left = left[: _CHUNK - filled], left[_CHUNK - filled :]
            chunk[filled : filled + len(part)] = part
            filled += len(part)
            if filled == _CHUNK:
                yield chunk
                filled = 0
    yield chunk[:filled]


def _accumulate(hi: Tensor, lo: Tensor, values: Tensor) -> None:
    """Split the values, which are overwritten, and add them to both limbs."""
    top = (values * (1 / _HI)).round_()
    hi.add_(top.long())
    lo.add_(values.sub_(top, alpha=_HI).mul_(1 / RESOLUTION).round_().long())
