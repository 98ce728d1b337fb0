"""OpenJij's samplers on the QUBO: simulated annealing, or simulated quantum annealing (extra ``openjij``).

OpenJij uses the same seed for all reads of a call, which gives the same sample. Here every read is a separate call with
its own seed, which keeps runs repeatable.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations.forms.bqm import EncodedBqm
from solvers.base import Search
from solvers.qubo.route import QuboSolver, SampleRound
from solvers.qubo.simulated_annealing import beta_range

ALGORITHMS = ("sa", "sqa")


@dataclass(frozen=True)
class OpenJij(QuboSolver):
    """OpenJij on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        algorithm: "sa" (temperatures as in solver 'sa') or "sqa" (OpenJij's default transverse field).
        num_reads: number of samples per round.
        num_sweeps: number of sweeps over all bits for each sample.
    """

    name: ClassVar[str] = "openjij"
    summary: ClassVar[str] = "OpenJij's annealing or quantum annealing on the QUBO; decoded, repaired, polished"
    requires: ClassVar[tuple[str, ...]] = ("dimod", "openjij")
    extra: ClassVar[str] = "openjij"
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1, "num_reads": 1, "num_sweeps": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {**QuboSolver.words, "algorithm": ALGORITHMS}
    small: ClassVar[int] = 10_000  # it converts models slowly
    algorithm: str = "sa"
    num_reads: int = 5
    num_sweeps: int = 300

    def sampling(self, search: Search) -> SampleRound:
        """Return a function that samples the reads one by one."""
        import dimod
        import openjij

        sampler = openjij.SASampler() if self.algorithm == "sa" else openjij.SQASampler()

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            hot, cold = beta_range(encoded)
            beta = {"beta_min": hot, "beta_max": cold} if self.algorithm == "sa" else {"beta": cold}

            def read(sweeps: int) -> Any:
                seed = int(search.rng.integers(2**31))
                return sampler.sample(encoded.bqm, num_reads=1, num_sweeps=sweeps, seed=seed, **beta)

            if np.isinf(seconds):
                return dimod.concatenate([read(self.num_sweeps) for _ in range(self.num_reads)])
            begun, before = search.elapsed(), search.rng.bit_generator.state
            trial: Any = read(1)
            samplesets: list[Any] = []
            search.rng.bit_generator.state = before  # the samples are those of a run without a time limit
            converted_s = search.elapsed() - begun  # every read converts the model again
            sweep_s = 1e-6 * max(trial.info["execution_time"], 1.0)
            while len(samplesets) < self.num_reads and search.elapsed() - begun + converted_s < seconds:
                affordable = (seconds - (search.elapsed() - begun) - converted_s) / sweep_s
                samplesets.append(read(max(1, min(self.num_sweeps, int(affordable)))))
            return dimod.concatenate(samplesets or [trial])

        return sample
