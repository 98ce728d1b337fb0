"""The record of one instance in the library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        fingerprint: fingerprint of the problem, which detects changes in a generator.
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
    best: float | None = None
    found_by: str = ""
    bound: float | None = None
    bound_by: str = ""
    literature: float | None = None

    @property
    def gap(self) -> float | None:
        """Relative gap between the best known objective and the bound."""
        return relative_gap(self.best, self.bound)

    @property
    def proven(self) -> bool:
        """Whether the best known choice is proven optimal."""
        return self.gap is not None and self.gap <= PROOF_TOLERANCE
