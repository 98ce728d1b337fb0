"""Simulated bifurcation on the QUBO (Goto et al., doi:10.1126/sciadv.abe7953), which updates all spins at once.

Every spin is an oscillator with a position x and a momentum y. While the pump rises from 0 to 1, the positions move
from 0 to one of two walls at ±1, driven by the other spins:

    y += dt·(−(1 − pump)·x − c·(h + J·s)),   x += dt·y,   and at a wall x stays there and y = 0

where s are the signs of the positions (discrete, with smaller errors) or the positions themselves (ballistic, which
settles faster), and c is scaled so that the force of random spins is about 1/2. All reads are columns of one matrix, so
each step is one product with J. (The package named after the method needs torch, which solvers never import.)
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse

from formulations.forms.bqm import EncodedBqm
from formulations.forms.couplings import Floats
from solvers.base import Search
from solvers.qubo.route import QuboSolver, SampleRound

DYNAMICS = ("discrete", "ballistic")

DT = 0.7
"""Time step; the literature uses 1.25 for couplings of similar size, but penalties make them uneven."""

DENSE = 0.05
"""Fraction of coupled pairs above which a dense product is faster."""

TRIAL_STEPS = 4


@dataclass(frozen=True)
class Bifurcation(QuboSolver):
    """Simulated bifurcation on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        dynamics: variant of the method, "discrete" or "ballistic".
        num_reads: number of samples per round.
        num_steps: number of time steps.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(5), "bifurcation", seed=0, rounds=2).feasible
    True
    """

    name: ClassVar[str] = "bifurcation"
    summary: ClassVar[str] = "simulated bifurcation on the QUBO, all spins at once; decoded, repaired, polished"
    requires: ClassVar[tuple[str, ...]] = ("dimod",)
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1, "num_reads": 1, "num_steps": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {**QuboSolver.words, "dynamics": DYNAMICS}
    dynamics: str = "discrete"
    num_reads: int = 20
    num_steps: int = 1000

    def sampling(self, search: Search) -> SampleRound:
        """Return a function that samples all reads together."""
        import dimod

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            biases, half = encoded.ising()
            couplings = half + half.T
            couplings = couplings.toarray() if half.nnz > DENSE * len(biases) ** 2 else couplings.tocsr()
            start = 0.1 * search.rng.uniform(-1, 1, size=(2, len(biases), self.num_reads))
            steps = self.num_steps
            if np.isfinite(seconds):
                begun = search.elapsed()
                x = bifurcate(biases, couplings, start, TRIAL_STEPS, discrete=self.dynamics == "discrete")
                steps = min(steps, int(TRIAL_STEPS * seconds / max(search.elapsed() - begun, 1e-9)))
            if steps > TRIAL_STEPS or np.isinf(seconds):
                x = bifurcate(biases, couplings, start, steps, discrete=self.dynamics == "discrete")
            states = (x.T > 0).astype(np.int8)
            variables = list(range(len(biases)))
            energies = encoded.bqm.energies((states, variables))
            return dimod.SampleSet.from_samples((states, variables), dimod.BINARY, energies)

        return sample


def bifurcate(biases: Floats, couplings: Any, start: Floats, steps: int, *, discrete: bool) -> Floats:
    """Compute the final positions ``(n, reads)`` from positions and momenta ``start`` ``(2, n, reads)``.

    The energy is ``h·s + ½·sᵀ·J·s`` with h = ``biases`` and symmetric J = ``couplings``.
    """
    x: Floats = start[0].copy()
    y: Floats = start[1].copy()
    squares = couplings.multiply(couplings) if scipy.sparse.issparse(couplings) else couplings * couplings
    strength = 0.5 / (float(np.sqrt(((biases**2).sum() + squares.sum()) / len(biases))) or 1.0)
    for step in range(steps):
        pump = (step + 1) / steps
        spins = np.sign(x) if discrete else x
        y -= DT * ((1.0 - pump) * x + strength * (biases[:, None] + couplings @ spins))
        x += DT * y
        outside = np.abs(x) > 1.0
        x[outside] = np.sign(x[outside])
        y[outside] = 0.0
    return x
