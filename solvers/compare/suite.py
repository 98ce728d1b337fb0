"""Comparisons of the same solvers on several problems, with a table over all of them."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from formulations.file_kinds import FileKind
from formulations.files import AnyPath, write_json
from formulations.formatting import markdown_table, percent
from solvers.base import relative_gap
from solvers.compare.rows import SHIFT_S, finite, reached, shifted_geometric_mean, target_s
from solvers.compare.spreadsheet import to_csv
from solvers.compare.tables import Comparison
from solvers.solution import Status

PROVEN = (Status.OPTIMAL, Status.INFEASIBLE)
"""Status of runs that answered their problem for good."""

SUITE_KIND = FileKind("qcompress comparison suite", version=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRow:
    """Results of one solver over all problems of a suite and all its seeds.

    Attributes:
        label: label of the solver.
        problems: number of problems on which the solver was run.
        proven_share: fraction of its runs with a proof that the choice is optimal, or that no choice meets the budgets.
        feasible_share: fraction of its runs with a choice. This and the following numbers leave out problems that any
            solver proved infeasible (`Comparison.infeasible`), and are None if no other problem is left.
        target_share: fraction of its runs that reached the target of their problem.
        gap: median over its runs of the gap to the best bound that any solver proved, or None.
        mean_target_s: shifted geometric mean of the times to the target; see `ComparisonRow`.
        wall_s: median wall time of a run in seconds.
        mean_wall_s: shifted geometric mean of the wall times.
    """

    label: str
    problems: int
    feasible_share: float | None
    target_share: float | None
    proven_share: float
    gap: float | None
    wall_s: float
    mean_wall_s: float
    mean_target_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Suite:
    """The same solvers compared on several problems: name of the problem → `Comparison`."""

    comparisons: Mapping[str, Comparison]

    def __getitem__(self, name: str) -> Comparison:
        """Return the comparison on one problem."""
        return self.comparisons[name]

    @property
    def target_words(self) -> str:
        """The target as a heading: ``1%`` of the best, or that each problem has a different one."""
        words = {comparison.target_words for comparison in self.comparisons.values()}
        return words.pop() if len(words) == 1 else "the targets"

    def rows(self) -> tuple[SuiteRow, ...]:
        """Return the table over all problems, sorted by how often solvers reach the target, then by speed."""
        labels = dict.fromkeys(label for comparison in self.comparisons.values() for label in comparison.solutions)
        rows = [self._row(label) for label in labels]
        return tuple(sorted(rows, key=lambda row: (-row.problems * (row.target_share or 0.0), row.wall_s)))

    def to_csv(self) -> str:
        """Format one line per run, as in `Comparison.to_csv`, with the name of the problem."""
        named = self.comparisons.items()
        return to_csv({**row, "problem": name} for name, comparison in named for row in comparison.run_rows())

    def _repr_markdown_(self) -> str:
        """Show the tables in a notebook."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Format the table over all problems, then one for each problem, as Markdown."""
        columns = (
            "solver", ">problems", f">to {self.target_words}", ">proven", ">feasible", ">median gap", ">time",
            ">mean time", ">mean time to target",
        )  # fmt: skip
        lines = [
            markdown_table(columns, map(suite_cells, self.rows())),
            "",
            f"Means are geometric, shifted by {SHIFT_S:g} s; runs that miss the target count with the time limit. "
            "Problems proven infeasible count only as proven, and with their times.",
        ]
        parts = [f"\n## {name}\n\n{comparison.to_markdown()}" for name, comparison in self.comparisons.items()]
        return "\n".join(lines) + "\n" + "".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the suite as a dictionary that JSON can store."""
        comparisons = {name: comparison.to_json() for name, comparison in self.comparisons.items()}
        return {**SUITE_KIND.header, "comparisons": comparisons}

    def save(self, path: AnyPath) -> None:
        """Write every run as JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Suite":
        """Read a suite that `save` wrote.

        Raises:
            FileFormatError: the file is not a suite, or has another version.
        """
        content = SUITE_KIND.read_json(path)
        with SUITE_KIND.building(path):
            comparisons = content["comparisons"].items()
            return cls(comparisons={name: Comparison.from_json(saved, str(path)) for name, saved in comparisons})

    def _row(self, label: str) -> SuiteRow:
        compared = [comparison for comparison in self.comparisons.values() if label in comparison.solutions]
        runs = [run for comparison in compared for run in comparison.solutions[label]]
        open_ones = [(one.yardstick, run) for one in compared if not one.infeasible for run in one.solutions[label]]
        gaps = [relative_gap(run.objective, yardstick.bound) for yardstick, run in open_ones]
        return SuiteRow(
            label=label,
            problems=len(compared),
            feasible_share=_share(run.feasible for _, run in open_ones),
            target_share=_share(reached(run, yardstick) for yardstick, run in open_ones),
            proven_share=sum(run.status in PROVEN for run in runs) / len(runs),
            gap=finite(statistics.median(np.inf if gap is None else gap for gap in gaps)) if gaps else None,
            wall_s=statistics.median(run.wall_s for run in runs),
            mean_wall_s=shifted_geometric_mean(run.wall_s for run in runs),
            mean_target_s=shifted_geometric_mean(target_s(run, yardstick) for yardstick, run in open_ones)
            if open_ones
            else None,
        )


def suite_cells(row: SuiteRow) -> list[str]:
    """Format a row of the table over all problems: label, problems, three shares, gap, and three times."""
    shares = [_or_dash(share, ".0%") for share in (row.target_share, row.proven_share, row.feasible_share)]
    times = [_or_dash(seconds, ".2f", " s") for seconds in (row.wall_s, row.mean_wall_s, row.mean_target_s)]
    return [row.label, str(row.problems), *shares, percent(row.gap), *times]


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


def _or_dash(value: float | None, spec: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{spec}}{unit}"
