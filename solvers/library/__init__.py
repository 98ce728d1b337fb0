"""A library of instances: each with its origin and licence, the best choice known, the best bound proven, by whom."""

from solvers.library.exact_sums import recomputed
from solvers.library.library import READERS, Library
from solvers.library.record import Record

__all__ = ["READERS", "Library", "Record", "recomputed"]
