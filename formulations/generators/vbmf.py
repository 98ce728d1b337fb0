"""Estimate the rank of a weight by variational Bayesian matrix factorisation, without any budget or threshold.

The noise level is estimated from the singular values. The empirical Bayes solution then keeps exactly the singular
values above a threshold that is known in closed form (Nakajima, Sugiyama, Babacan & Tomioka, "Global analytic
solution of fully-observed variational Bayesian matrix factorization", JMLR 14, 2013). Kim et al. (arXiv 1511.06530)
choose the ranks of convolutions with it.
"""

import numpy as np
import scipy.optimize
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError

EDGE = 2.5129
"""Constant of the fit ``EDGE·sqrt(alpha)`` to the threshold τ (exact values in table 1 of the paper; error 1 %)."""


def vbmf_rank(singular_values: ArrayLike, shape: tuple[int, int]) -> int:
    """Count the singular values that stand out from the noise.

    Args:
        singular_values: ``(min(m, n),)`` singular values, descending.
        shape: shape ``(m, n)`` of the weight as a matrix.

    Raises:
        InvalidProblemError: the number of singular values does not match the shape.

    >>> rng = np.random.default_rng(0)
    >>> weight = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 40)) + 0.1 * rng.normal(size=(60, 40))
    >>> vbmf_rank(np.linalg.svd(weight, compute_uv=False), weight.shape)
    3
    """
    values = np.asarray(singular_values, dtype=np.float64)
    short, long = sorted(shape)
    if values.shape != (short,):
        raise InvalidProblemError(f"a {shape[0]}×{shape[1]} matrix has {short} singular values, found {values.shape}")
    if not values.any():
        return 0
    values = values / values.max()
    alpha = short / long
    tau = EDGE * np.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    squares = np.square(values)
    most = min(int(np.ceil(short / (1 + alpha))) - 1, short - 1)
    upper = float(squares.sum()) / (short * long)
    lower = max(float(squares[most]) / (long * edge), float(squares[most:].mean()) / long, 1e-12 * upper)
    if lower >= upper:
        return int((squares > long * upper * edge).sum())
    minimum = scipy.optimize.minimize_scalar(
        _free_energy, args=(squares / long, alpha, edge), bounds=(lower, upper), method="bounded"
    )
    return int((squares > long * minimum.x * edge).sum())


def _free_energy(noise: float, scaled: NDArray[np.float64], alpha: float, edge: float) -> float:
    """Compute the free energy at a noise variance, up to a constant: equation (25) of the paper."""
    ratio = np.maximum(scaled / noise, 1e-300)
    signal, rest = ratio[ratio > edge], ratio[ratio <= edge]
    shifted = signal - (1 + alpha)
    tau = 0.5 * (shifted + np.sqrt(np.maximum(np.square(shifted) - 4 * alpha, 0.0)))
    energy = (rest - np.log(rest)).sum() + (signal - tau).sum()
    return float(energy + np.log((tau + 1) / signal).sum() + alpha * np.log(tau / alpha + 1).sum())
