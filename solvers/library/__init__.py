"""A library of instances, each with its origin, licence, best known choice and best proven bound, and their sources."""

from solvers.library.exact_sums import recomputed
from solvers.library.library import READERS, Library
from solvers.library.record import Record

__all__ = ["READERS", "Library", "Record", "recomputed"]
