"""The record of one instance in the library."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from formulations.errors import FileFormatError
from solvers.search import PROOF_TOLERANCE
from solvers.solution import relative_gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instance: its origin, and the best known results.

    Attributes:
        name: name of the instance, unique in the library.
        origin: source of the instance, with a reference.
        licence: licence of the instance.
        family, arguments: family in `formulations.generators.families`, and its arguments, for a generated instance.
        file, reader: file in the library's folder or in the folder of published instances, and the name of its reader.
        fingerprint: fingerprint of the problem; of a generated one, of all but the values of its numbers.
        sums: weighted sums of a generated problem's numbers, whose last bits depend on the processor.
        best, found_by: objective of the best known choice, and the solver that found it.
        bound, bound_by: best lower bound, and the solver that proved it.
        literature: best objective known in the literature, whose choice may not be available.
    """

    name: str
    origin: str
    licence: str = "made by this project, Apache-2.0"
    family: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    reader: str = ""
    fingerprint: str = ""
    sums: Mapping[str, float] = field(default_factory=dict)
    best: float | None = None
    found_by: str = ""
    bound: float | None = None
    bound_by: str = ""
    literature: float | None = None

    @classmethod
    def read(cls, entry: object) -> "Record":
        """Return the record that an entry of a library's file holds.

        Raises:
            FileFormatError: the entry lacks a field, has an unknown one, or one of the wrong type.

        >>> Record.read({"name": "a", "origin": "drawn", "best": "3"})
        Traceback (most recent call last):
        ...
        formulations.errors.FileFormatError: its best '3' is not a finite number
        """
        if not isinstance(entry, Mapping):
            raise FileFormatError(f"a record must be a mapping, found {entry!r}")
        known = {one.name: one for one in fields(cls)}
        if unknown := [name for name in entry if name not in known]:
            raise FileFormatError(f"it has unknown fields: {', '.join(unknown)}")
        if missing := [name for name in ("name", "origin") if name not in entry]:
            raise FileFormatError(f"it lacks the fields: {', '.join(missing)}")
        for name, value in entry.items():
            if known[name].type is str and not isinstance(value, str):
                raise FileFormatError(f"its {name} must be a text, found {value!r}")
            if name in ("arguments", "sums") and not isinstance(value, Mapping):
                raise FileFormatError(f"its {name} must be a mapping, found {value!r}")
        record = cls(**entry)
        if wrong := record.wrong_numbers():
            raise FileFormatError("; ".join(wrong))
        return record

    def wrong_numbers(self) -> list[str]:
        """List the known results and the sums that are not finite numbers; empty if there are none."""
        results = {"best": self.best, "bound": self.bound, "literature": self.literature}
        values = {what: value for what, value in results.items() if value is not None}
        values |= {f"sum of {name}": value for name, value in self.sums.items()}
        wrong = {what: value for what, value in values.items() if not _is_finite(value)}
        return [f"its {what} {value!r} is not a finite number" for what, value in wrong.items()]

    @property
    def gap(self) -> float | None:
        """Relative gap between the best known objective and the bound."""
        return relative_gap(self.best, self.bound)

    @property
    def proven(self) -> bool:
        """Whether the best known choice is proven optimal."""
        return self.gap is not None and self.gap <= PROOF_TOLERANCE


def _is_finite(value: object) -> bool:
    """Whether a value of a record is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False
