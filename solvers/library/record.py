"""What is known of one instance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from solvers.search import PROOF_TOLERANCE
from solvers.solution import relative_gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instance: where it comes from, and the best that is known of it.

    Attributes:
        name: unique in the library.
        origin: where it comes from, with a reference.
        licence: of the instance.
        family: a family of `formulations.generators.families`, with ``arguments``; or
        file: a file in the library's folder, or in the folder of published ones, read by ``reader``.
        fingerprint: the problem's, so that a generator that changes is noticed.
        best: objective of the best choice known; ``found_by`` whom.
        bound: the best lower bound; ``bound_by`` whom.
        literature: objective of the best choice that the literature knows, of which there may be no choice here.
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
        """How far the best known may be from optimal, relative to it."""
        return relative_gap(self.best, self.bound)

    @property
    def proven(self) -> bool:
        """Whether the best known is proven optimal."""
        return self.gap is not None and self.gap <= PROOF_TOLERANCE
