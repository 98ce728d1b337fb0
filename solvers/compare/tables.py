"""Results of comparing solvers on one problem (`Comparison`), and their tables.

Every `Solution` is kept, and the tables are computed from them, so that a comparison loaded from a file gives the same
tables. All solvers are measured by the same reference values: the best bound that any of them proved, the best
objective found or known to the caller, and one target. (For several problems see `solvers.compare.suite`.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formulations.file_kinds import FileKind
from formulations.files import AnyPath, plain, read_json, write_json
from formulations.formatting import markdown_table, number, one_line, percent
from solvers.compare.rows import ComparisonRow, Yardstick, comparison_row, run_rows
from solvers.compare.spreadsheet import to_csv
from solvers.compare.time_to_target import TimeToTarget, target_near
from solvers.solution import Solution, Status, StopReason

FILE_KIND = FileKind("qcompress comparison", version=2)

COLUMNS = (
    "solver", ">median objective", ">best", ">above best known", ">gap to bound", ">own bound", ">feasible", ">time",
    ">processor",
)  # fmt: skip

TARGET = 0.01
"""Default distance from the best known objective at which a run has reached its target, as a fraction."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """All runs of a comparison on one problem.

    Attributes:
        problem_fingerprint: fingerprint of the problem.
        time_limit: time limit of every run in seconds, or None.
        seeds: random seeds.
        solutions: label → Solutions in the order of ``seeds``.
        skipped: label → why the solver was not run (it does not support the problem, or a package is missing).
        best_known: an objective known to the caller, or None.
        stated_target: the target objective given by the caller, or None to derive it from ``within``.
        within: distance of the target from the best known objective, as a fraction.
    """

    problem_fingerprint: str
    time_limit: float | None
    seeds: tuple[int, ...]
    solutions: Mapping[str, tuple[Solution, ...]]
    skipped: Mapping[str, str]
    best_known: float | None = None
    stated_target: float | None = None
    within: float = TARGET

    @property
    def best(self) -> float | None:
        """Best objective that any run found."""
        return min((run.objective for run in self._runs() if run.objective is not None), default=None)

    @property
    def reference(self) -> float | None:
        """Best objective that the caller knew or any run found."""
        return min((value for value in (self.best_known, self.best) if value is not None), default=None)

    @property
    def target(self) -> float | None:
        """Objective at or below which a run has reached its target."""
        if self.stated_target is not None:
            return self.stated_target
        return None if self.reference is None else target_near(self.reference, self.within)

    @property
    def target_words(self) -> str:
        """The target as a heading: ``1%`` of the best, or the given objective."""
        return number(self.stated_target) if self.stated_target is not None else f"{100 * self.within:g}%"

    @property
    def bound(self) -> float | None:
        """Best bound that any run proved, limited to the best objective (which rounding could exceed)."""
        bound = max((run.bound for run in self._runs() if run.bound is not None), default=None)
        return bound if bound is None or self.best is None else min(bound, self.best)

    @property
    def infeasible(self) -> bool:
        """Whether a run proved that no choice meets the budgets, and none found one."""
        return self.best is None and any(run.status is Status.INFEASIBLE for run in self._runs())

    @property
    def yardstick(self) -> Yardstick:
        """Reference values for the runs."""
        return Yardstick(reference=self.reference, bound=self.bound, target=self.target, time_limit=self.time_limit)

    @property
    def errors(self) -> dict[str, str]:
        """Return label and seed → error for every run that ended with an error."""
        return {
            f"{label}, seed {run.seed}": str(run.details["error"])
            for label, runs in self.solutions.items()
            for run in runs
            if run.stop_reason is StopReason.ERROR_RECOVERED
        }

    @property
    def machines(self) -> tuple[str, ...]:
        """Describe the machines on which runs were made."""
        machines = [run.details["machine"] for run in self._runs() if "machine" in run.details]
        return tuple(dict.fromkeys(_machine_words(machine) for machine in machines))

    def rows(self) -> tuple[ComparisonRow, ...]:
        """Return the table, sorted by median objective, then by speed."""
        rows = [comparison_row(label, runs, self.yardstick) for label, runs in self.solutions.items()]
        return tuple(sorted(rows, key=lambda row: (row.median is None, row.median or 0.0, row.wall_s)))

    def run_rows(self) -> list[dict[str, Any]]:
        """Return one row per run, with plain values by column."""
        rows = [run_rows(label, runs, self.yardstick) for label, runs in self.solutions.items()]
        return [{"problem": self.problem_fingerprint, **row} for solver_rows in rows for row in solver_rows]

    def to_csv(self) -> str:
        """Format one line per run, with its times by phase, options, error, versions and machine."""
        return to_csv(self.run_rows())

    def notes(self) -> list[str]:
        """Return lines of notes for the table: reference values, solvers not run, failed runs, machines."""
        known = "" if self.best_known is None else f", best known before {number(self.best_known)}"
        lines = [f"Best objective {number(self.best)}{known}, best bound {number(self.bound)}."]
        if self.infeasible:
            reasons = [str(run.details["infeasible"]) for run in self._runs() if "infeasible" in run.details]
            lines.append(one_line(f"Proven: {(*reasons, 'no choice meets all budgets together')[0]}."))
        if self.best_known is not None and self.bound is not None and self.best_known < self.bound:
            lines.append("The best value known before is below a proven bound, so one of the two is wrong.")
        if self.target is not None:
            lines.append(f"Target {number(self.target)}, seeds {list(self.seeds)}.")
        lines += [one_line(f"Not run: {label} ({why}).") for label, why in self.skipped.items()]
        lines += [one_line(f"Failed: {run} ({why}).") for run, why in self.errors.items()]
        return lines + [f"Run on {machine}." for machine in self.machines]

    def _repr_markdown_(self) -> str:
        """Show the tables in a notebook."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Format the table, followed by the times by phase, as Markdown."""
        rows = self.rows()
        lines = [markdown_table((*COLUMNS, f">to {self.target_words}", "status"), map(_cells, rows)), ""]
        lines += [*_phase_table(rows), *self.notes()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as a dictionary that JSON can store."""
        runs = {label: [run.to_json() for run in runs] for label, runs in self.solutions.items()}
        header = {**FILE_KIND.header, "problem_fingerprint": self.problem_fingerprint}
        settings = plain({"time_limit": self.time_limit, "seeds": self.seeds, "skipped": self.skipped})
        target = {"best_known": self.best_known, "stated_target": self.stated_target, "within": self.within}
        return {**header, **settings, **target, "solutions": runs}

    def save(self, path: AnyPath) -> None:
        """Write every run as JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Comparison":
        """Read a comparison that `save` wrote.

        Raises:
            FileFormatError: the file is not a comparison, or has another version.
        """
        return cls.from_json(read_json(path, FILE_KIND.name), str(path))

    @classmethod
    def from_json(cls, json: dict[str, Any], where: str) -> "Comparison":
        """Restore a comparison from the dictionary that `to_json` returned; ``where`` names its origin in errors.

        Raises:
            FileFormatError: the dictionary is not a comparison, or has another version.
        """
        FILE_KIND.require(json, where)
        with FILE_KIND.building(where):
            return cls(
                problem_fingerprint=json["problem_fingerprint"],
                time_limit=json["time_limit"],
                seeds=tuple(json["seeds"]),
                solutions={
                    label: tuple(Solution.from_json(run, where) for run in runs)
                    for label, runs in json["solutions"].items()
                },
                skipped=dict(json["skipped"]),
                best_known=json["best_known"],
                stated_target=json["stated_target"],
                within=json["within"],
            )

    def _runs(self) -> list[Solution]:
        return [run for runs in self.solutions.values() for run in runs]


def until(time: TimeToTarget | None) -> str:
    """Format a time to target with its bootstrap interval."""
    if time is None or time.seconds is None:
        return "–"
    high = "∞" if time.bootstrap_high_s is None else f"{time.bootstrap_high_s:.2g}"
    return f"{time.seconds:.2g} s ({time.bootstrap_low_s:.2g}–{high})"


def _cells(row: ComparisonRow) -> list[str]:
    """Format a row under `COLUMNS`, the time to the target and the status."""
    numbers = [number(row.median), number(row.best), percent(row.above_best), percent(row.gap), number(row.bound)]
    times = [f"{row.feasible_share:.0%}", f"{row.wall_s:.2f} s", _seconds(row.cpu_s), until(row.to_target)]
    return [row.label, *numbers, *times, ", ".join(f"{status} ×{count}" for status, count in row.statuses.items())]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


def _phase_table(rows: Iterable[ComparisonRow]) -> list[str]:
    """Format the median times by phase, one line per solver; empty if no solver reports phases."""
    timed = [row for row in rows if row.phases]
    names = list(dict.fromkeys(name for row in timed for name in row.phases))
    if not names:
        return []
    heads = [">" + name.removesuffix("_s").replace("_", " ") for name in names]
    lines = [
        [row.label, *(f"{row.phases[name]:.2g}" if name in row.phases else "–" for name in names)] for row in timed
    ]
    return [markdown_table(["seconds by phase", *heads], lines), ""]


def _machine_words(machine: Mapping[str, Any]) -> str:
    memory = "" if machine["memory_gb"] is None else f", {machine['memory_gb']:g} GB"
    return f"{machine['processor']}, {machine['cores']} cores{memory}, {machine['system']}, Python {machine['python']}"
