"""The result of a solver: the choice, its proven quality, and the record of the run.

`Status` says what is known about the answer; `StopReason` says why the solver stopped. The incumbent at a time limit is
FEASIBLE, and OPTIMAL only if a bound proves it.
"""

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from formulations.file_kinds import FileKind
from formulations.files import AnyPath, plain, read_json, write_json
from formulations.formatting import amount, markdown_table, number, percent

FILE_KIND = FileKind("qcompress solution", version=1)


class Status(enum.StrEnum):
    """How much is known about the answer."""

    OPTIMAL = "OPTIMAL"  # no feasible choice is better (to 1e-9 of the numbers that its objective sums)
    FEASIBLE = "FEASIBLE"  # within the budgets; better choices may exist
    INFEASIBLE = "INFEASIBLE"  # proven: no choice meets all budgets together
    UNKNOWN = "UNKNOWN"  # no feasible choice was found, but infeasibility is not proven


class StopReason(enum.StrEnum):
    """Why the solver stopped."""

    COMPLETED = "COMPLETED"
    TIME_LIMIT = "TIME_LIMIT"
    INTERRUPTED = "INTERRUPTED"
    ERROR_RECOVERED = "ERROR_RECOVERED"  # external code failed; ``details["error"]`` describes the error


class TracePoint(NamedTuple):
    """Objective and bound at ``t_s`` seconds after the start."""

    t_s: float
    objective: float | None
    bound: float | None


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """Return ``(objective - bound) / |objective|``; 0 if they meet, None if one is missing or the objective is 0."""
    if objective is None or bound is None:
        return None
    if objective <= bound:
        return 0.0
    return (objective - bound) / abs(objective) if objective != 0 else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """The result of one solver run.

    Attributes:
        choice: ``(G,)`` local option index of every group, or None when no feasible choice was found.
        objective, usage, feasible: results of `Problem.evaluate` for the choice (objective None without a choice).
        bound: proven lower bound on the objective of every feasible choice, or None.
        gap: ``(objective - bound) / |objective|``, or None without objective or bound.
        status: what is known about the answer.
        stop_reason: why the solver stopped.
        wall_s: wall time in seconds.
        timing: time by phase: ``build_s``, ``solve_s``, ``decode_s``, and for remote solvers ``queue_s``, ``qpu_s``.
        trace: objective of the incumbent and bound over time.
        solver, seed, options: the solver's name, its random seed and its options.
        details: additional results of the solver (multipliers, sample quality before repair, why it was selected).
        pool: good choices with their objectives, best first, if requested (see `solvers.pool`).
        problem_fingerprint: fingerprint of the problem.
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
        """Return the solution as a dictionary that JSON can store."""
        options = {name: _stored(option) for name, option in self.options.items()}
        value: dict[str, Any] = plain({**FILE_KIND.header, **asdict(self), "options": options})
        return value

    def _repr_markdown_(self) -> str:
        """Show the answer in a notebook: status, objective, bound, gap and use."""
        stopped = "" if self.stop_reason is StopReason.COMPLETED else f", stopped: {self.stop_reason}"
        rows = [
            ("status", f"{self.status} (by {self.solver} in {self.wall_s:.2f} s{stopped})"),
            ("objective", number(self.objective, 9)),
            ("bound", number(self.bound, 9)),
            ("gap", percent(self.gap)),
            *((name, amount(used)) for name, used in self.usage.items()),
        ]
        return markdown_table(("solution", ">"), rows)

    def save(self, path: AnyPath) -> None:
        """Write the solution as JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Solution":
        """Read a solution that `save` wrote.

        Raises:
            FileFormatError: the file is not a solution, or has another version.
        """
        return cls.from_json(read_json(path, FILE_KIND.name), str(path))

    @classmethod
    def from_json(cls, json: dict[str, Any], where: str) -> "Solution":
        """Restore a solution from the dictionary that `to_json` returned; ``where`` names its origin in errors.

        Raises:
            FileFormatError: the dictionary is not a solution, or has another version.
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


def uninterrupted(solution: Solution) -> Solution:
    """Return the solution of a run that is one of many, unless Ctrl-C, which is meant for all of them, ended it.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the run.
    """
    if solution.stop_reason is StopReason.INTERRUPTED:
        raise KeyboardInterrupt
    return solution


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    array = np.array(values)
    if array.ndim != 1 or array.dtype.kind != "i":
        raise ValueError(f"a choice must be a list of whole numbers, found {values!r}")
    return array.astype(np.int64)


def _stored(option: Any) -> Any:
    """Return an option as JSON stores it, or its ``repr`` if JSON cannot: it says what was run and is not read back."""
    try:
        json.dumps(plain(option), allow_nan=False)
    except (TypeError, ValueError):
        return repr(option)
    return plain(option)
