"""Estimate how much of a binary quadratic model is lost on a processor of limited precision.

A quantum annealer is programmed in spins: biases h and couplings J are scaled together into its ranges (h in ±4, J in
±1 on D-Wave's processors) and set by converters of limited precision, with further control errors. D-Wave's
documentation ("Errors and Error Correction", section ICE, docs.dwavequantum.com) shows errors equivalent to four or
five bits; `BITS` is the optimistic value. Only rounding is modelled: noise, chains and their strength add to it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from formulations.forms.bqm import EncodedBqm
from formulations.forms.couplings import Floats

BITS = 5
"""Assumed precision in bits: a step is the end of the range times 2^-5."""

BIAS_RANGE = 4.0
"""Ratio of the ranges of biases and couplings."""

CHOICES = 200
"""Number of random choices to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientReport:
    """Range of a model's spin coefficients, in the objective's unit, and the effects of rounding them.

    Attributes:
        variables, couplings: number of variables and of couplings.
        linear, quadratic: smallest and largest magnitude of nonzero biases and couplings; None if all are 0.
        dynamic_range_bits: log2 of the ratio of the largest to the smallest magnitude, with biases divided by 4.
        bits: assumed precision in bits.
        lost_biases, lost_couplings: fraction of the nonzero biases and couplings that are rounded to 0.
        order_kept: fraction of pairs of random choices that the rounded model puts in the same order.
        moves_kept: the same fraction for a random choice and one that differs in one group, as in a local search.
    """

    variables: int
    couplings: int
    linear: tuple[float, float] | None
    quadratic: tuple[float, float] | None
    dynamic_range_bits: float
    bits: int
    lost_biases: float
    lost_couplings: float
    order_kept: float
    moves_kept: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dictionary that JSON can store."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"coefficients span {self.dynamic_range_bits:.1f} bits; at {self.bits} bits of precision "
            f"{self.lost_couplings:.0%} of the {self.couplings:,} couplings are lost; a choice and one that differs in "
            f"one group keep their order in {self.moves_kept:.0%} of cases, two random choices in {self.order_kept:.0%}"
        )


def coefficient_report(encoded: EncodedBqm, *, bits: int = BITS, seed: int = 0) -> CoefficientReport:
    """Report the range of a model's coefficients and the loss at a processor's precision.

    Args:
        encoded: the encoded model.
        bits: assumed precision in bits.
        seed: seed of the random choices.

    >>> from formulations import to_bqm
    >>> from formulations.generators.random_instances import layered_problem
    >>> report = coefficient_report(to_bqm(layered_problem(5), "domain-wall", prices={"bytes": 1e-5}))
    >>> report.variables, report.lost_couplings > 0.1, report.moves_kept < 1
    (25, True, True)
    """
    linear, couplings = encoded.ising()
    largest = max(float(np.abs(linear).max(initial=0.0)) / BIAS_RANGE, float(np.abs(couplings.data).max(initial=0.0)))
    step = 2.0**-bits * (largest or 1.0)
    coarse_linear = np.round(linear / (BIAS_RANGE * step)) * BIAS_RANGE * step
    coarse = couplings.copy()
    coarse.data = np.round(couplings.data / step) * step
    biases, weights = np.abs(linear[linear != 0]), np.abs(couplings.data)
    sizes = np.concatenate([biases / BIAS_RANGE, weights])
    random, moved = (2.0 * states - 1.0 for states in _states(encoded, np.random.default_rng(seed)))
    exact = [_energies(linear, couplings, spins) for spins in (random, moved)]
    rounded = [_energies(coarse_linear, coarse, spins) for spins in (random, moved)]
    first, second = np.triu_indices(CHOICES, 1)
    return CoefficientReport(
        variables=len(linear),
        couplings=len(weights),
        linear=(float(biases.min()), float(biases.max())) if len(biases) else None,
        quadratic=(float(weights.min()), float(weights.max())) if len(weights) else None,
        dynamic_range_bits=float(np.log2(sizes.max() / sizes.min())) if len(sizes) else 0.0,
        bits=bits,
        lost_biases=_share(coarse_linear[linear != 0] == 0),
        lost_couplings=_share(coarse.data == 0),
        order_kept=_kept(exact[0][first] - exact[0][second], rounded[0][first] - rounded[0][second]),
        moves_kept=_kept(exact[0] - exact[1], rounded[0] - rounded[1]),
    )


def _states(encoded: EncodedBqm, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the states ``(CHOICES, n)`` of random choices, and of the same choices with one group changed."""
    sizes = np.diff(encoded.group_offsets)
    choices = rng.integers(0, sizes, size=(CHOICES, len(sizes)))
    moved = choices.copy()
    several = np.flatnonzero(sizes > 1)
    if len(several):
        group = rng.choice(several, CHOICES)
        rows = np.arange(CHOICES)
        moved[rows, group] = (choices[rows, group] + rng.integers(1, sizes[group])) % sizes[group]
    states = [np.array([encoded.encode(choice) for choice in block], dtype=np.float64) for block in (choices, moved)]
    return states[0], states[1]


def _energies(linear: Floats, couplings: Any, spins: Floats) -> Floats:
    return np.asarray(spins @ linear + ((couplings @ spins.T).T * spins).sum(axis=1))


def _kept(exact: Floats, rounded: Floats) -> float:
    """Return the fraction of nonzero differences whose sign is kept."""
    tolerance = 1e-9 * np.abs(exact).max(initial=0.0)
    differs = np.abs(exact) > tolerance
    return _share(np.sign(exact[differs]) * rounded[differs] > tolerance, empty=1.0)


def _share(flags: Any, empty: float = 0.0) -> float:
    return float(np.mean(flags)) if len(flags) else empty
