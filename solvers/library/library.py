"""The library of instances: a folder of records, best known choices, and problems that no generator makes.

The folder contains ``records.json``, the best choices in ``choices.npz``, and problem files. Published instances are
not copied: their records name the file and its reader, and the folder with these files is a separate argument. Records
can be checked by arithmetic that shares no code with `Problem.evaluate`.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.errors import FileFormatError
from formulations.exchange import published
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.generators.families import member
from solvers.errors import described
from solvers.library.exact_sums import TOLERANCE, recomputed
from solvers.library.numbers import pattern, same_numbers, sums
from solvers.library.record import Record
from solvers.search import PROOF_TOLERANCE
from solvers.solution import Solution

RECORDS_FILE = "records.json"
RECORDS = FileKind("qcompress instance records", version=2)
CHOICES = FileKind("qcompress instance choices", version=1)

READERS = MappingProxyType(
    {
        "max-cut": published.read_max_cut,
        "qubo": published.read_coordinate_qubo,
        "ising": published.read_ising,
        "mkp": published.read_multidimensional_knapsack,
        "qkp": published.read_quadratic_knapsack,
        "mmkp": published.read_multiple_choice_knapsack,
        "problem": Problem.load,
    }
)
"""Readers of problem files, by the name used in records."""


class Library:
    """The records of a folder, and their problems.

    Args:
        folder: path of the folder with ``records.json``.
        published: path of the folder with published instances, or None.

    Attributes:
        records, choices: the records and their best known choices ``(G,)``, by name.
        damaged: name and error of each entry of the file that is not a record; such a library cannot be saved.

    >>> import tempfile
    >>> library = Library(tempfile.mkdtemp())
    >>> library.add(Record(name="q4", origin="drawn", family="random_qubo", arguments={"variables": 4, "density": 1.0}))
    >>> from solvers import solve
    >>> library.improve("q4", solve(library.problem("q4"), "brute-force"))
    True
    >>> library.records["q4"].proven, library.check("q4")
    (True, [])
    """

    def __init__(self, folder: AnyPath, published: AnyPath | None = None) -> None:
        self.folder = Path(folder)
        self.published = None if published is None else Path(published)
        self.records: dict[str, Record] = {}
        self.choices: dict[str, NDArray[np.int64]] = {}
        self.damaged: list[tuple[str, str]] = []
        self._twice: set[str] = set()
        if (self.folder / RECORDS_FILE).exists():
            self._read_records(self.folder / RECORDS_FILE)
        if (self.folder / "choices.npz").exists():
            _, arrays = CHOICES.read_arrays(self.folder / "choices.npz")
            for name, array in arrays.items():  # what holds no whole numbers stays as it is, for `check`
                self.choices[name] = array.astype(np.int64) if array.dtype.kind in "iu" else array

    def _read_records(self, file: Path) -> None:
        content = RECORDS.read_json(file)
        with RECORDS.building(file):
            entries = list(content["records"])
        for position, entry in enumerate(entries):
            try:
                record = Record.read(entry)
            except FileFormatError as error:
                named = entry.get("name") if isinstance(entry, dict) else None
                self.damaged.append((named if isinstance(named, str) else f"record {position}", str(error)))
                continue
            if record.name in self.records:
                self._twice.add(record.name)
            self.records[record.name] = record

    def require_whole(self) -> None:
        """Refuse a library with entries that are not records.

        Raises:
            FileFormatError: there are such entries; the message gives the first.
        """
        if self.damaged:
            raise FileFormatError(f"{self.folder / RECORDS_FILE} has damaged records: {': '.join(self.damaged[0])}")

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def add(self, record: Record) -> None:
        """Add an instance, with the fingerprint of its problem.

        Raises:
            ValueError: an instance of this name exists.
        """
        if record.name in self.records:
            raise ValueError(f"the library already has an instance {record.name!r}")
        self.records[record.name] = _of_problem(record, self._read(record))

    def has(self, name: str) -> bool:
        """Whether the instance's problem is available; it is not if the file of a published one is missing."""
        record = self.records[name]
        return bool(record.family) or not record.file or self._file(record) is not None

    def problem(self, name: str) -> Problem:
        """Return the problem of an instance.

        Raises:
            FileNotFoundError: the instance is a published one and its file is missing.
            FileFormatError: the problem is not the one that was recorded.
        """
        record = self.records[name]
        problem = self._read(record)
        found = pattern(problem) if record.family else problem.fingerprint()
        different = "" if found == record.fingerprint else "its fingerprint differs"
        if not different and record.family and not same_numbers(problem, record.sums):
            different = "its numbers differ"
        if different:
            raise FileFormatError(f"instance {name!r} is not the one that was recorded: {different}")
        return problem

    def improve(self, name: str, solution: Solution) -> bool:
        """Store the solution's choice or bound if they are better; return whether one of them was.

        The choice is evaluated again by `recomputed`. `check` detects a bound above the best known objective.
        """
        record, by = self.records[name], _signature(solution)
        if solution.choice is not None:
            objective, excess = recomputed(self.problem(name), solution.choice)
            if not excess and (record.best is None or _better(objective, record.best)):
                record = replace(record, best=objective, found_by=by)
                self.choices[name] = np.array(solution.choice, dtype=np.int64)
        if solution.bound is not None and (record.bound is None or _better(-solution.bound, -record.bound)):
            record = replace(record, bound=solution.bound, bound_by=by)
        changed = record != self.records[name]
        self.records[name] = record
        return changed

    def check(self, name: str) -> list[str]:
        """List the errors of a record, by recomputing its choice and comparing its bound; empty if there are none."""
        record = self.records[name]
        wrong = ["more than one record has this name"] if name in self._twice else []
        if wrong := wrong + record.wrong_numbers():
            return wrong
        try:
            return self._recomputed_errors(record)
        except Exception as error:  # a damaged record may fail in any way, and the others are still to be checked
            return [str(error) if isinstance(error, ValueError) else described(error)]

    def _recomputed_errors(self, record: Record) -> list[str]:
        """List the errors of a record with valid numbers.

        Raises:
            ValueError: its problem is another one, or its choice is invalid.
        """
        problem, choice, wrong = self.problem(record.name), self.choices.get(record.name), []
        if choice is None and record.best is not None:
            wrong.append(f"no choice is recorded with the objective {record.best!r}")
        if choice is not None:
            objective, excess = recomputed(problem, choice)
            if record.best is None or abs(objective - record.best) > TOLERANCE * (1 + abs(objective)):
                wrong.append(f"its choice costs {objective!r}, but {record.best!r} is recorded")
            wrong += [f"its choice is over the budget {budget!r} by {more:g}" for budget, more in excess.items()]
        if record.best is not None and record.bound is not None:
            above = record.bound - record.best
            if above > TOLERANCE * (1 + abs(record.best)):
                wrong.append(f"its bound {record.bound!r} is above the best known {record.best!r}")
        return wrong

    def save(self) -> None:
        """Write the records and choices.

        Raises:
            FileFormatError: the library has entries that are not records, which would be lost.
        """
        self.require_whole()
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = [{**asdict(record), "arguments": dict(record.arguments)} for record in self]
        RECORDS.write_json(self.folder / RECORDS_FILE, {"records": entries})
        small = {name: _narrowed(choice) for name, choice in self.choices.items()}
        CHOICES.write_arrays(self.folder / "choices.npz", {}, small)

    def _read(self, record: Record) -> Problem:
        if record.family:
            return member(record.family, record.arguments)
        if not record.file:
            raise FileFormatError(f"instance {record.name!r} has neither a family nor a file")
        if (file := self._file(record)) is None:
            raise FileNotFoundError(f"instance {record.name!r} is published in {record.origin}; its file {record.file} "
                                    "is missing: give the folder that contains it")  # fmt: skip
        if record.reader not in READERS:
            raise FileFormatError(f"there is no reader {record.reader!r}; there are: {', '.join(READERS)}")
        return READERS[record.reader](file)

    def _file(self, record: Record) -> Path | None:
        folders = [self.folder, *([] if self.published is None else [self.published])]
        return next((file for folder in folders if (file := folder / str(record.file)).is_file()), None)


def _of_problem(record: Record, problem: Problem) -> Record:
    """Return the record with what recognises its problem."""
    if record.family:
        return replace(record, fingerprint=pattern(problem), sums=sums(problem))
    return replace(record, fingerprint=problem.fingerprint())


def _narrowed(choice: NDArray[Any]) -> NDArray[Any]:
    """Return a choice in the smallest type that holds it; leave invalid ones unchanged, for `Library.check` to name."""
    whole = choice.dtype.kind in "ui" and choice.size and choice.min() >= 0
    return choice.astype(np.min_scalar_type(choice.max())) if whole else choice


def _better(objective: float, known: float) -> bool:
    """Whether an objective is better by more than rounding errors."""
    return objective < known - PROOF_TOLERANCE * abs(known)


def _signature(solution: Solution) -> str:
    return f"{solution.solver} of qcompress {version('qcompress')}, {solution.wall_s:.3g} s, seed {solution.seed}"
