"""What a solver gives back: the choice, what is known about it, and how it was found.

Two questions are kept apart. `Status` says what is known about the answer; `StopReason` says why the solver
stopped. A time-limited incumbent is FEASIBLE, never OPTIMAL, unless a bound proves it.
"""

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from formulations.file_kinds import FileKind
from formulations.files import AnyPath, read_json, write_json

FILE_KIND = FileKind("qcompress solution", version=1)


class Status(enum.StrEnum):
    """What is known about the answer."""

    OPTIMAL = "OPTIMAL"  # no choice within the budgets is better (to a relative 1e-9)
    FEASIBLE = "FEASIBLE"  # within the budgets; better ones may exist
    INFEASIBLE = "INFEASIBLE"  # proved: no choice meets all budgets together
    UNKNOWN = "UNKNOWN"  # no choice within the budgets was found, and none was ruled out


class StopReason(enum.StrEnum):
    """Why the solver stopped."""

    COMPLETED = "COMPLETED"
    TIME_LIMIT = "TIME_LIMIT"
    INTERRUPTED = "INTERRUPTED"
    ERROR_RECOVERED = "ERROR_RECOVERED"  # foreign code failed; ``details["error"]`` says how


class TracePoint(NamedTuple):
    """The state of knowledge at ``t_s`` seconds after the start."""

    t_s: float
    objective: float | None
    bound: float | None


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """``(objective - bound) / |objective|``, 0 when they meet, None when one is missing or the objective is 0."""
    if objective is None or bound is None:
        return None
    if objective <= bound:
        return 0.0
    return (objective - bound) / abs(objective) if objective != 0 else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """The answer of one solver run.

    Attributes:
        choice: ``(G,)`` local option index of every group, or None when no feasible choice was found.
        objective, usage, feasible: as `Problem.evaluate` judges the choice (objective None without one).
        bound: proven lower bound on the objective of every feasible choice, or None.
        gap: ``(objective - bound) / |objective|``, or None without objective or bound.
        timing: seconds by phase: ``build_s``, ``solve_s``, ``decode_s``, for remote solvers ``queue_s``, ``qpu_s``.
        trace: incumbent and bound over time.
        details: what the solver tells beyond that (multipliers, sample quality before repair, why it was picked).
        pool: good choices with their objectives, best first, where they were asked for (see `solvers.pool`).
    """

    choice: NDArray[np.int64] | None
    objective: float | None
    usage: dict[str, float]
    feasible: bool
    bound: float | None
    gap: float | None
    status: Status
    stop_reason: StopReason
    wall_s: float
    timing: dict[str, float] = field(default_factory=dict)
    trace: tuple[TracePoint, ...] = ()
    solver: str = ""
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    pool: tuple[tuple[tuple[int, ...], float], ...] = ()
    problem_fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        value = asdict(self)
        value["choice"] = None if self.choice is None else self.choice.tolist()
        return {**FILE_KIND.header, **value}

    def save(self, path: AnyPath) -> None:
        """Write the solution as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Solution":
        """Read a solution that `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON, or of a newer version.
        """
        return cls.from_json(read_json(path, FILE_KIND.name), str(path))

    @classmethod
    def from_json(cls, json: dict[str, Any], where: str) -> "Solution":
        """The solution that `to_json` made a dictionary of; ``where`` names its origin in errors.

        Raises:
            FileFormatError: it is no such dictionary, or of a newer version.
        """
        value = FILE_KIND.content(json, where)
        with FILE_KIND.building(where):
            value["choice"] = None if value["choice"] is None else _whole_numbers(value["choice"])
            value |= {
                name: None if value[name] is None else float(value[name]) for name in ("objective", "bound", "gap")
            }
            value["usage"] = {str(name): float(use) for name, use in value["usage"].items()}
            value["wall_s"] = float(value["wall_s"])
            value["status"], value["stop_reason"] = Status(value["status"]), StopReason(value["stop_reason"])
            value["trace"] = tuple(TracePoint(*point) for point in value["trace"])
            value["pool"] = tuple((tuple(choice), objective) for choice, objective in value["pool"])
            return cls(**value)


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    array = np.array(values)
    if array.ndim != 1 or array.dtype.kind != "i":
        raise ValueError(f"a choice is a list of whole numbers, found {values!r}")
    return array.astype(np.int64)
