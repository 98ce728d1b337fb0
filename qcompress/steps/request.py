"""What `compress` was asked for, checked as far as it can be before anything runs, and who is told how it goes on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from formulations import Problem
from qcompress.budgets import Amount
from qcompress.engines.base import Engine
from qcompress.identity import Identity, identify, identify_batches
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.latency import TimingProgress
from qcompress.measuring.offered import Offered
from qcompress.measuring.progress import MeasureProgress
from qcompress.model.calibration import Calibration
from qcompress.model.samples import Split
from qcompress.refinement import RefineStep
from qcompress.training.finetune import FinetuneProgress
from solvers import Progress, Solver, SolverError

KEPT = "validation"
"""Name of the identity of the batches kept aside."""


MEASUREMENT_FILE = "measurement.npz"


REFITTED_FILE = "refitted.npz"


MODEL_FILE = "model.safetensors"


class NoChoiceError(SolverError, RuntimeError):
    """The solver found no choice within the budgets of ``problem``."""

    problem: Problem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Who is told how the steps go on; see `qcompress.compress`."""

    on_encode: Callable[[EncodeProgress], None] | None
    on_measure: Callable[[MeasureProgress], None] | None
    on_timing: Callable[[TimingProgress], None] | None
    on_progress: Callable[[Progress], None] | None
    on_round: Callable[[RefineStep], None] | None
    on_finetune: Callable[[FinetuneProgress], None] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What `compress` was asked for, checked as far as it can be before anything runs; see there.

    Attributes:
        data: all batches, those of ``calibration`` and the samples kept aside.
        split: how the data was split; whose ``calibration`` is the calibration's data.
        kept: batches that nothing is fitted to, or none.
        guard: whether choices are tried on them.
        copied: a copy of the model, made before anything was measured: what is compressed is a copy of it.
        measurement: one that was made earlier, or None.
        identities: of what is in ``calibration`` and ``kept``, or nothing where no folder keeps the run.
        room_bytes: more room in the file, where a first try came out too large.
        tight_room: whether none is left for the parts' entries, where the usual one left no choice.
        engine: what the choice is made for, or None for our own file.
    """

    calibration: Calibration
    data: Iterable[Any]
    split: Split
    kept: Iterable[Any]
    guard: bool
    copied: nn.Module
    measurement: Measurement | None
    offered: Offered
    method: str
    granularity: str | int
    budget: Mapping[str, Amount]
    minimize: str | None
    loss_limit: float | None
    pairs: bool | float
    solver: Solver
    time_limit: float | None
    refine_rounds: int
    batch_norm_data: Iterable[Any] | None
    finetune_steps: int
    learning_rate: float
    evaluate: Callable[[nn.Module], float] | None
    callbacks: Callbacks
    identities: Mapping[str, Identity]
    room_bytes: float = 0.0
    tight_room: bool = False
    engine: Engine | None = None

    def measured_from(self) -> dict[str, Any]:
        """What the measurement depends on."""
        identities = {name: own for name, own in self.identities.items() if name != KEPT}
        if self.measurement is not None:
            model = {name: own for name, own in identities.items() if name == "model"}
            return {**model, "measurement": replace(self.measurement, codes={})}  # codes follow from the rest
        return {
            **identities,
            "options": self.offered.to_json(),
            "method": self.method,
            "granularity": self.granularity,
        }

    def solved_by(self) -> dict[str, Any]:
        """What, besides the problem, a solution depends on."""
        solver = [self.solver.name, self.solver]
        return {"solver": solver, "time_limit": self.time_limit, "seed": self.calibration.seed}


def identity_of(batches: Iterable[Any] | None, name: str) -> Identity:
    """The digest of all batches, or of there being none."""
    return identify(None) if batches is None else identify_batches(batches, name)
