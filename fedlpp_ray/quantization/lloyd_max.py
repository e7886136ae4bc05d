"""Lloyd-Max levels for Gaussian weights that were divided by the largest magnitude of their block.

Let a block hold B independent N(0, 1) weights, m = max|x| and u = x / m. Given m, u is +-1 with
probability 1/B and otherwise a normal truncated to [-m, m], divided by m. The levels minimise
E[m^2 (u - level)^2], the squared error of the weights *after* the scale is multiplied back; the
factor m^2 and the point mass at +-1 both matter (without the factor the four levels of B = 64 are
+-.178, +-.602 in place of +-.173, +-.589).

The density of m is 2B phi(m) (2 Phi(m) - 1)^(B-1); integrals over m are sums over a uniform grid,
which converge exponentially fast because the integrand is smooth and vanishes at both ends.
"""

import math

import torch
from torch import Tensor

_TOLERANCE = 1e-10
_LLOYD_STEPS, _NEWTON_STEPS = 10, 50


class _NormalisedGaussian:
    """The m^2-weighted distribution of u = x / max|block|, on the positive side."""

    def __init__(self, block: int) -> None:
        m = torch.linspace(0, 10, 1001, dtype=torch.float64)[1:, None]
        inside = torch.erf(m / math.sqrt(2))
        weight = m**2 * torch.exp(-(m**2) / 2 + (block - 1) * inside.log())
        weight /= weight.sum()
        self.point_mass = 1 / (2 * block)
        self._m = m
        self._weight = weight / inside * (block - 1) / block

    def density(self, u: Tensor) -> Tensor:
        """Weighted density at ``u`` in [0, 1), without the point mass."""
        return (self._weight * self._m * self._phi(u)).sum(0)

    def mass_below(self, u: Tensor) -> Tensor:
        """Integral of the density over [0, u)."""
        return (self._weight * torch.erf(self._m * u / math.sqrt(2)) / 2).sum(0)

    def moment_below(self, u: Tensor) -> Tensor:
        """Integral of u times the density over [0, u)."""
        return (self._weight / self._m * (1 / math.sqrt(2 * math.pi) - self._phi(u))).sum(0)

    def _phi(self, u: Tensor) -> Tensor:
        return torch.exp(-((self._m * u) ** 2) / 2) / math.sqrt(2 * math.pi)


def lloyd_max_levels(count: int, block: int) -> Tensor:
    """Return the ``count`` positive levels for blocks of ``block`` weights, ascending float32.

    Rounded to 6 decimals, so that every machine uses the same table; the negative levels are their
    mirror image. Lloyd's iteration brings the levels near the fixed point, Newton's method (its
    Hessian is tridiagonal) finishes in a few steps where Lloyd's would take thousands.

    Raises ``RuntimeError`` if the iteration does not settle.
    """
    law = _NormalisedGaussian(block)
    levels = _companded(law, count)
    for step in range(_LLOYD_STEPS + _NEWTON_STEPS):
        edges = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_ones(1)])
        mass, moment = law.mass_below(edges).diff(), law.moment_below(edges).diff()
        mass[-1] += law.point_mass
        moment[-1] += law.point_mass
        if step < _LLOYD_STEPS:
            change = moment / mass - levels
        else:
            change = -_newton_step(levels, mass, moment, law.density(edges[1:-1]))
        levels = levels + change
        if change.abs().max() < _TOLERANCE:
            return levels.round(decimals=6).float()
    raise RuntimeError(f"no Lloyd-Max levels found for {count} positive levels, block {block}")


def _newton_step(levels: Tensor, mass: Tensor, moment: Tensor, density: Tensor) -> Tensor:
    """Solve Hessian * step = gradient of half the squared error; ``density`` at the inner edges."""
    coupling = density * levels.diff() / 4
    none = levels.new_zeros(1)
    diagonal = mass - torch.cat([coupling, none]) - torch.cat([none, coupling])
    hessian = torch.diag(diagonal) - torch.diag(coupling, 1) - torch.diag(coupling, -1)
    step: Tensor = torch.linalg.solve(hessian, levels * mass - moment)
    return step


def _companded(law: _NormalisedGaussian, count: int) -> Tensor:
    """Starting levels: spaced as density^(1/3), the optimum for many levels."""
    u = torch.linspace(0, 1, 2049, dtype=torch.float64)
    share = law.density(u).pow(1 / 3).cumsum(0)
    centres = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return u[torch.searchsorted(share / share[-1], centres)]
