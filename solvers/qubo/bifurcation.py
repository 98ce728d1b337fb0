"""Simulated bifurcation on the QUBO (Goto et al., doi:10.1126/sciadv.abe7953): spins as oscillators, all moved at once.

Every spin has a position x and a momentum y. While the pump rises from 0 to 1 the positions leave 0 for one of two
walls at ±1, pushed by the other spins:

    y += dt·(−(1 − pump)·x − c·(h + J·s)),   x += dt·y,   and at a wall x stays there and y = 0

with s the signs of the positions (discrete, which errs less) or the positions themselves (ballistic, which is
faster to settle), and c scaled so that the push of random spins is about 1/2. All reads are columns of one matrix, so
that a step is one product with J; the package that goes by the method's name needs torch, which solvers never import.
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
"""Step in time; the literature takes 1.25 for even couplings, penalties make them uneven."""

DENSE = 0.05
"""Share of couplings above which a dense product is faster."""

TRIAL_STEPS = 4


@dataclass(frozen=True)
class Bifurcation(QuboSolver):
    """Simulated bifurcation on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        dynamics: "discrete" or "ballistic".
        num_reads: samples a round.
        num_steps: steps in time.

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
        """All reads together."""
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
    """Final positions ``(n, reads)`` from positions and momenta ``start`` ``(2, n, reads)``.

    The energy is ``h·s + ½·sᵀ·J·s`` with h = ``biases`` and J = ``couplings``, symmetric.
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
