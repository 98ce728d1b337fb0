"""What came out of comparing solvers: every run on one problem (`Comparison`) or on several (`Suite`), and the tables.

Every `Solution` is kept and the tables are computed from them, so that a comparison loaded from its file shows the
same. All solvers are measured by the same yardstick: the best bound that any of them proved, the best objective that
any found or the caller knew, and one target.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formulations.file_kinds import FileKind
from formulations.files import AnyPath, read_json, write_json
from formulations.formatting import number, percent
from solvers.compare.rows import ComparisonRow, Yardstick, comparison_row, run_rows
from solvers.compare.spreadsheet import to_csv
from solvers.compare.time_to_target import TimeToTarget, target_near
from solvers.solution import Solution, StopReason

FILE_KIND = FileKind("qcompress comparison", version=2)

TARGET = 0.01
"""Unless the caller says otherwise, a run has reached its target within this share of the best objective known."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Every run of a comparison: label → Solutions in the order of ``seeds``.

    Attributes:
        problem_fingerprint: of the problem that all of them solved.
        skipped: label → why this solver was not run (it cannot take the problem, or a package is missing).
        best_known: an objective that the caller knew, or None.
        stated_target: an objective that counts as reached, or None for ``within`` of the best known.
        within: share of the best objective known.
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
        """The best objective that any run found."""
        return min((run.objective for run in self._runs() if run.objective is not None), default=None)

    @property
    def reference(self) -> float | None:
        """The best objective that the caller knew or any run found."""
        return min((value for value in (self.best_known, self.best) if value is not None), default=None)

    @property
    def target(self) -> float | None:
        """The objective at or below which a run has reached its target."""
        if self.stated_target is not None:
            return self.stated_target
        return None if self.reference is None else target_near(self.reference, self.within)

    @property
    def target_words(self) -> str:
        """The target as a heading: ``1%`` of the best, or the objective that was stated."""
        return number(self.stated_target) if self.stated_target is not None else f"{100 * self.within:g}%"

    @property
    def bound(self) -> float | None:
        """The best bound that any run proved (not above the best objective, where rounding alone could put it)."""
        bound = max((run.bound for run in self._runs() if run.bound is not None), default=None)
        return bound if bound is None or self.best is None else min(bound, self.best)

    @property
    def yardstick(self) -> Yardstick:
        """What its runs are measured by."""
        return Yardstick(reference=self.reference, bound=self.bound, target=self.target, time_limit=self.time_limit)

    @property
    def errors(self) -> dict[str, str]:
        """Label and seed of every run that an error ended → what it was."""
        return {
            f"{label}, seed {run.seed}": str(run.details["error"])
            for label, runs in self.solutions.items()
            for run in runs
            if run.stop_reason is StopReason.ERROR_RECOVERED
        }

    @property
    def machines(self) -> tuple[str, ...]:
        """The machines that runs were made on, in words."""
        found = [run.details["machine"] for run in self._runs() if "machine" in run.details]
        return tuple(dict.fromkeys(_machine_words(machine) for machine in found))

    def rows(self) -> tuple[ComparisonRow, ...]:
        """The table, best median first; among equals the quicker one."""
        rows = [comparison_row(label, runs, self.yardstick) for label, runs in self.solutions.items()]
        return tuple(sorted(rows, key=lambda row: (row.median is None, row.median or 0.0, row.wall_s)))

    def run_rows(self) -> list[dict[str, Any]]:
        """One row for every run: plain values by column."""
        rows = [run_rows(label, runs, self.yardstick) for label, runs in self.solutions.items()]
        return [{"problem": self.problem_fingerprint, **row} for solver_rows in rows for row in solver_rows]

    def to_csv(self) -> str:
        """One line for every run, with its times by phase, its options, its error, versions and machine."""
        return to_csv(self.run_rows())

    def notes(self) -> list[str]:
        """What the table does not say, in lines: the yardstick, what did not run or failed, machines."""
        known = "" if self.best_known is None else f", best known before {number(self.best_known)}"
        lines = [f"Best objective {number(self.best)}{known}, best bound {number(self.bound)}."]
        if self.best_known is not None and self.bound is not None and self.best_known < self.bound:
            lines.append("The best value known before lies below a proven bound: one of the two is wrong.")
        if self.target is not None:
            lines.append(f"Target {number(self.target)}, seeds {list(self.seeds)}.")
        lines += [f"Not run: {label} ({why})." for label, why in self.skipped.items()]
        lines += [f"Failed: {run} ({why})." for run, why in self.errors.items()]
        return lines + [f"Run on {machine}." for machine in self.machines]

    def to_markdown(self) -> str:
        """The table as Markdown, and below it the times by phase."""
        lines = [
            "| solver | median objective | best | above best known | gap to bound | own bound | feasible | time "
            f"| processor | to {self.target_words} | status |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        rows = self.rows()
        for row in rows:
            numbers = [number(row.median), number(row.best), percent(row.above_best), percent(row.gap)]
            numbers += [number(row.bound), f"{row.feasible_share:.0%}", f"{row.wall_s:.2f} s", _seconds(row.cpu_s)]
            statuses = ", ".join(f"{status} ×{count}" for status, count in row.statuses.items())
            lines.append(f"| {row.label} | {' | '.join(numbers)} | {until(row.to_target)} | {statuses} |")
        lines += ["", *_phase_table(rows), *self.notes()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        runs = {label: [run.to_json() for run in runs] for label, runs in self.solutions.items()}
        header = {**FILE_KIND.header, "problem_fingerprint": self.problem_fingerprint}
        settings = {"time_limit": self.time_limit, "seeds": self.seeds, "skipped": dict(self.skipped)}
        target = {"best_known": self.best_known, "stated_target": self.stated_target, "within": self.within}
        return {**header, **settings, **target, "solutions": runs}

    def save(self, path: AnyPath) -> None:
        """Write every run as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON, or of a newer version.
        """
        return cls.from_json(read_json(path, FILE_KIND.name), str(path))

    @classmethod
    def from_json(cls, json: dict[str, Any], where: str) -> "Comparison":
        """The comparison that `to_json` made a dictionary of; ``where`` names its origin in errors.

        Raises:
            FileFormatError: it is no such dictionary, or of a newer version.
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
                best_known=json.get("best_known"),  # the first version had none
                stated_target=json.get("stated_target"),
                within=json.get("within", TARGET),
            )

    def _runs(self) -> list[Solution]:
        return [run for runs in self.solutions.values() for run in runs]


def until(time: TimeToTarget | None) -> str:
    """A time to target with its bootstrap interval, in words."""
    if time is None or time.seconds is None:
        return "–"
    high = "∞" if time.bootstrap_high_s is None else f"{time.bootstrap_high_s:.2g}"
    return f"{time.seconds:.2g} s ({time.bootstrap_low_s:.2g}–{high})"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"


def _phase_table(rows: Iterable[ComparisonRow]) -> list[str]:
    """Median seconds by phase, one line a solver; nothing where no solver tells of phases."""
    told = [row for row in rows if row.phases]
    names = list(dict.fromkeys(name for row in told for name in row.phases))
    if not names:
        return []
    heads = [name.removesuffix("_s").replace("_", " ") for name in names]
    lines = [f"| seconds by phase | {' | '.join(heads)} |", f"|---|{'--:|' * len(names)}"]
    for row in told:
        cells = [f"{row.phases[name]:.2g}" if name in row.phases else "–" for name in names]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _machine_words(machine: Mapping[str, Any]) -> str:
    memory = "" if machine["memory_gb"] is None else f", {machine['memory_gb']:g} GB"
    return f"{machine['processor']}, {machine['cores']} cores{memory}, {machine['system']}, Python {machine['python']}"
