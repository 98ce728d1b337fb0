"""The arguments of `compress` as a value, and the checked request that its steps work on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import nn

from formulations.files import AnyPath
from qcompress.budgets import LATENCY, Amount
from qcompress.engines.base import Engine
from qcompress.identity import Identity, identify, identify_batches, once
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.stopwatch import TimingProgress, conditions
from qcompress.model.calibration import Calibration
from qcompress.model.forward import Forward
from qcompress.model.losses import LossFunction
from qcompress.model.samples import Split
from qcompress.options import Options
from qcompress.refinement import RefineStep
from qcompress.training.finetune import FinetuneProgress
from solvers import Progress, Solver, SolverLike

KEPT = "validation"
"""Name of the identity of the held-out batches."""


MEASUREMENT_FILE = "measurement.npz"


REFITTED_FILE = "refitted.npz"


MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arguments:
    """The arguments of `qcompress.compress` as given; they are documented there."""

    model: nn.Module
    data: Iterable[Any]
    budget: Mapping[str, Amount]
    minimize: str | None
    options: Options | Mapping[str, Options] | Offered | None
    skip: str | Iterable[str]
    only: str | Iterable[str] | None
    solver: SolverLike
    time_limit: float | None
    seed: int
    method: str
    loss: str | LossFunction
    forward: Forward | None
    granularity: str | int
    pairs: bool | float
    measurement: Measurement | None
    validation: Iterable[Any] | None
    guard: bool
    target: str | Engine | None
    output: AnyPath | None
    memory: int | str | None
    jobs: int
    batch_norm_data: Iterable[Any] | None
    rounds: int
    refine_rounds: int
    finetune_steps: int
    learning_rate: float
    evaluate: Callable[[nn.Module], float] | None
    folder: AnyPath | None
    on_encode: Callable[[EncodeProgress], None] | None
    on_measure: Callable[[MeasureProgress], None] | None
    on_timing: Callable[[TimingProgress], None] | None
    on_progress: Callable[[Progress], None] | None
    on_round: Callable[[RefineStep], None] | None
    on_finetune: Callable[[FinetuneProgress], None] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request(Arguments):
    """The checked arguments, with the values derived from them.

    Attributes:
        solver: the solver, ready to run.
        budget: budgets of resources, without the limit on the loss.
        calibration: the model with the batches that costs are measured on and codes are fitted to.
        split: how ``data`` was divided into calibration data and held-out samples.
        kept: held-out batches; empty if the choice is not checked.
        copied: a copy of the model, made before measuring; copies of it are compressed.
        offered: the options by layer.
        loss_limit: maximum predicted loss, if a resource is minimized.
        identities: digests of the contents of ``calibration`` and ``kept``, and of the options' code before it ran;
            empty without a run folder.
        room_bytes: bytes to leave free in the file, after a first attempt was too large.
        tight_room: whether to reserve no bytes for the parts' entries, because the usual reserve left no choice.
        engine: the engine to compress for, or None for the package's own file.
        metric_before: what ``evaluate`` returned for the original, before measuring.
        original_use: resource → use of the original, in a round that starts from a smaller network.
    """

    solver: Solver
    calibration: Calibration
    split: Split
    kept: Iterable[Any]
    copied: nn.Module
    offered: Offered
    loss_limit: float | None
    identities: Mapping[str, Identity]
    engine: Engine | None
    metric_before: float | None = None
    room_bytes: float = 0.0
    tight_room: bool = False
    original_use: Mapping[str, float] | None = None

    @classmethod
    def of(cls, arguments: Arguments, **values: Any) -> "Request":
        """Return the request for ``arguments``, with ``values`` added or replacing those of the same name."""
        given = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
        return cls(**{**given, **values})

    def identities_of_options(self) -> dict[str, Identity]:
        """Return the identity of the given measurement, or of the code of options, which may change when it runs."""
        if self.measurement is not None:
            return {"measurement": identify(replace(self.measurement, codes={}), "measurement")}  # codes follow from it
        return {"code of options": self.offered.code()}

    def measured_from(self) -> dict[str, Any]:
        """Return everything that the measurement depends on."""
        identities = {name: identity for name, identity in self.identities.items() if name != KEPT}
        if self.measurement is not None:
            return {name: identity for name, identity in identities.items() if name in ("model", "measurement")}
        return {
            **identities,
            "options": self.offered.to_json(),
            "method": self.method,
            "granularity": self.granularity,
        }

    def original_of(self, measurement: Measurement) -> Mapping[str, float]:
        """Resource → use of the original, which need not be the measured network."""
        return measurement.original if self.original_use is None else self.original_use

    def solved_by(self) -> dict[str, Any]:
        """Return everything that a solution depends on, besides the problem."""
        solver = once(self.solver, find=partial(identify, self.solver, "solver"))
        limits = {"time_limit": self.time_limit, "seed": self.calibration.seed}
        return {"solver": solver, "solver's name": self.solver.name, **limits}

    def judged_by(self) -> dict[str, Any]:
        """Return everything that a true loss or time, and a choice made by it, depends on, besides the choice."""
        engine = None if self.engine is None else [self.engine.name, self.engine]
        timed = conditions(self.calibration.model) if LATENCY in self.budget else {}
        return {**self.measured_from(), **self.identities, **self.solved_by(), **timed, "engine": engine}


def identity_of(batches: Iterable[Any] | None, name: str) -> Identity:
    """Return the digest of all batches, or of None."""
    return identify(None) if batches is None else identify_batches(batches, name)
