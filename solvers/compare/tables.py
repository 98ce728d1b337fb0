"""What came out of comparing solvers: every run on one problem (`Comparison`) or on several (`Suite`), and the tables.

Every `Solution` is kept and the tables are computed from them, so that a comparison loaded from its file shows the
same. The gaps of all solvers refer to the same bound: the best one that any of them proved.
"""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from formulations.file_kinds import FileKind
from formulations.files import AnyPath, read_json, write_json
from formulations.formatting import number, percent
from solvers.base import relative_gap
from solvers.compare.time_to_target import TimeToTarget, target_near, time_to_target
from solvers.solution import Solution, Status, StopReason

FILE_KIND = FileKind("qcompress comparison", version=1)
SUITE_KIND = FileKind("qcompress comparison suite", version=1)

TARGET = 0.01
"""A run has reached its target when it is within this share of the best objective any run found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One solver over all its seeds.

    Attributes:
        label: its name, with the options that differ from their defaults.
        feasible_share: runs that found a choice, over all runs.
        best, median: objectives; a run without a choice counts as infinite, an infinite value is given as None.
        above_best: ``(median - b) / |median|`` for the best objective b that any solver found, or None.
        gap: ``(median - bound) / |median|`` for the best bound that any solver proved, or None.
        bound: the best bound of its own, or None.
        wall_s: median time of a run.
        statuses: how often each status came.
        to_target: time to within `TARGET` of the best that any solver found, or None when none found a choice.
    """

    label: str
    feasible_share: float
    best: float | None
    median: float | None
    above_best: float | None
    gap: float | None
    bound: float | None
    wall_s: float
    statuses: Mapping[str, int]
    to_target: TimeToTarget | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Every run of a comparison: label → Solutions in the order of ``seeds``.

    Attributes:
        problem_fingerprint: of the problem that all of them solved.
        skipped: label → why this solver was not run (it cannot take the problem, or a package is missing).
    """

    problem_fingerprint: str
    time_limit: float | None
    seeds: tuple[int, ...]
    solutions: Mapping[str, tuple[Solution, ...]]
    skipped: Mapping[str, str]

    @property
    def best(self) -> float | None:
        """The best objective that any run found."""
        return min((run.objective for run in self._runs() if run.objective is not None), default=None)

    @property
    def bound(self) -> float | None:
        """The best bound that any run proved (not above the best objective, where rounding alone could put it)."""
        bound = max((run.bound for run in self._runs() if run.bound is not None), default=None)
        return bound if bound is None or self.best is None else min(bound, self.best)

    @property
    def errors(self) -> dict[str, str]:
        """Label and seed of every run that an error ended → what it was."""
        return {
            f"{label}, seed {run.seed}": str(run.details["error"])
            for label, runs in self.solutions.items()
            for run in runs
            if run.stop_reason is StopReason.ERROR_RECOVERED
        }

    def rows(self) -> tuple[ComparisonRow, ...]:
        """The table, best median first; among equals the quicker one."""
        rows = [_row(label, runs, self.best, self.bound) for label, runs in self.solutions.items()]
        return tuple(sorted(rows, key=lambda row: (row.median is None, row.median or 0.0, row.wall_s)))

    def to_markdown(self) -> str:
        """The table as Markdown."""
        lines = [
            "| solver | median objective | best | above best | gap to bound | own bound | feasible | time "
            f"| to {TARGET:.0%} | status |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        for row in self.rows():
            numbers = [number(row.median), number(row.best), percent(row.above_best), percent(row.gap)]
            numbers += [number(row.bound), f"{row.feasible_share:.0%}", f"{row.wall_s:.2f} s", _until(row.to_target)]
            statuses = ", ".join(f"{status} ×{count}" for status, count in row.statuses.items())
            lines.append(f"| {row.label} | {' | '.join(numbers)} | {statuses} |")
        lines += [
            "",
            f"Best objective {number(self.best)}, best bound {number(self.bound)}, seeds {list(self.seeds)}.",
        ]
        lines += [f"Not run: {label} ({why})." for label, why in self.skipped.items()]
        lines += [f"Failed: {run} ({why})." for run, why in self.errors.items()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        runs = {label: [run.to_json() for run in runs] for label, runs in self.solutions.items()}
        header = {**FILE_KIND.header, "problem_fingerprint": self.problem_fingerprint}
        settings = {"time_limit": self.time_limit, "seeds": self.seeds, "skipped": dict(self.skipped)}
        return {**header, **settings, "solutions": runs}

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
            )

    def _runs(self) -> list[Solution]:
        return [run for runs in self.solutions.values() for run in runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRow:
    """One solver over all problems of a suite and all its seeds.

    Attributes:
        problems: number of problems that it was run on.
        feasible_share, proven_share: share of its runs with a choice, and with a proof of optimality.
        target_share: share of its runs within `TARGET` of the best that any solver found for the problem.
        gap: median over its runs of the gap to the best bound that any solver proved, or None.
        wall_s: median time of a run.
    """

    label: str
    problems: int
    feasible_share: float
    target_share: float
    proven_share: float
    gap: float | None
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Suite:
    """The same solvers compared on several problems: name of the problem → `Comparison`."""

    comparisons: Mapping[str, Comparison]

    def __getitem__(self, name: str) -> Comparison:
        """The comparison on one problem."""
        return self.comparisons[name]

    def rows(self) -> tuple[SuiteRow, ...]:
        """The table over all problems: solvers that are most often near the best first; among equals the quicker."""
        labels = dict.fromkeys(label for comparison in self.comparisons.values() for label in comparison.solutions)
        rows = [self._row(label) for label in labels]
        return tuple(sorted(rows, key=lambda row: (-row.problems * row.target_share, row.wall_s)))

    def to_markdown(self) -> str:
        """The table over all problems, then one for each, as Markdown."""
        lines = [
            f"| solver | problems | within {TARGET:.0%} of the best | proven | feasible | median gap | time |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in self.rows():
            shares = [f"{share:.0%}" for share in (row.target_share, row.proven_share, row.feasible_share)]
            values = [str(row.problems), *shares, percent(row.gap), f"{row.wall_s:.2f} s"]
            lines.append(f"| {row.label} | {' | '.join(values)} |")
        parts = [f"\n## {name}\n\n{comparison.to_markdown()}" for name, comparison in self.comparisons.items()]
        return "\n".join(lines) + "\n" + "".join(parts)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        comparisons = {name: comparison.to_json() for name, comparison in self.comparisons.items()}
        return {**SUITE_KIND.header, "comparisons": comparisons}

    def save(self, path: AnyPath) -> None:
        """Write every run as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Suite":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON, or of a newer version.
        """
        content = SUITE_KIND.read_json(path)
        with SUITE_KIND.building(path):
            comparisons = content["comparisons"].items()
            return cls(comparisons={name: Comparison.from_json(saved, str(path)) for name, saved in comparisons})

    def _row(self, label: str) -> SuiteRow:
        compared = [
            (comparison, comparison.solutions[label])
            for comparison in self.comparisons.values()
            if label in comparison.solutions
        ]
        pairs = [(comparison, run) for comparison, runs in compared for run in runs]
        near = [comparison.best is not None and _near(run, comparison.best) for comparison, run in pairs]
        gaps = [relative_gap(run.objective, comparison.bound) for comparison, run in pairs]
        median = statistics.median(np.inf if gap is None else gap for gap in gaps)
        return SuiteRow(
            label=label,
            problems=len(compared),
            feasible_share=sum(run.feasible for _, run in pairs) / len(pairs),
            target_share=sum(near) / len(pairs),
            proven_share=sum(run.status is Status.OPTIMAL for _, run in pairs) / len(pairs),
            gap=_finite(median),
            wall_s=statistics.median(run.wall_s for _, run in pairs),
        )


def _near(run: Solution, best: float) -> bool:
    return run.objective is not None and run.objective <= target_near(best, TARGET)


def _row(label: str, runs: tuple[Solution, ...], best: float | None, bound: float | None) -> ComparisonRow:
    objectives = [np.inf if run.objective is None else run.objective for run in runs]
    median = _finite(statistics.median(objectives))
    return ComparisonRow(
        label=label,
        feasible_share=sum(run.feasible for run in runs) / len(runs),
        best=_finite(min(objectives)),
        median=median,
        above_best=relative_gap(median, best),
        gap=relative_gap(median, bound),
        bound=max((run.bound for run in runs if run.bound is not None), default=None),
        wall_s=statistics.median(run.wall_s for run in runs),
        statuses=dict(Counter(str(run.status) for run in runs)),
        to_target=None if best is None else time_to_target(runs, target_near(best, TARGET)),
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _until(time: TimeToTarget | None) -> str:
    if time is None or time.seconds is None:
        return "–"
    return f"{time.seconds:.2g} s ({time.low_s:.2g}–{time.high_s:.2g})"
