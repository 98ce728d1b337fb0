"""Solvers and samplers of one's own, as a user would keep them in a module; tests name them by import path."""

import threading
from dataclasses import dataclass

import dimod
import numpy as np

from solvers import Solver


@dataclass(frozen=True)
class Dice(Solver):
    """Random choices; the answer depends on the seed and on nothing else."""

    name = "dice"
    summary = "random choices"

    rolls: int = 5

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
        for _ in range(self.rolls):
            search.offer(search.rng.integers(0, np.diff(problem.group_offsets)))


@dataclass(frozen=True)
class Broken(Solver):
    """A solver that fails."""

    name = "broken"
    summary = "fails"

    def run(self, problem, search):
        raise ArithmeticError("the cogwheel\nis stuck")


class UntoldError(Exception):
    """An error without a text."""

    def __str__(self):
        raise LookupError("no text")


@dataclass(frozen=True)
class Odd(Solver):
    """A solver that reports what JSON cannot store, or raises an error without a text."""

    name = "odd"
    summary = "odd details"

    kind: str = "nan"

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
        if self.kind == "untold":
            raise UntoldError
        search.details["odd"] = ODD[self.kind]


class Downhill(dimod.Sampler):
    """The all-zero state, as often as asked."""

    parameters = {"num_reads": [], "depth": []}  # noqa: RUF012  (dimod has it so)
    properties = {}  # noqa: RUF012

    def __init__(self, bit=0):
        self.bit = bit

    def sample(self, bqm, num_reads=1, depth=1):
        states = np.full((num_reads, bqm.num_variables), self.bit, dtype=np.int8)
        return dimod.SampleSet.from_samples_bqm((states, bqm.variables), bqm)


class Exact:
    """A CQM sampler that tries everything."""

    parameters = {}  # noqa: RUF012

    def sample_cqm(self, cqm):
        return dimod.ExactCQMSolver().sample_cqm(cqm)


def truncated():
    """A composite."""
    return dimod.TruncateComposite(Downhill(), 1)


ONES = Downhill(bit=1)
NUMBER = 3
ODD = {"nan": float("nan"), "infinite": [np.inf], "set": {1}, "bytes": b"1", "keys": {(1, 2): 3}, "function": len,
       "lock": threading.Lock(), "half": "\ud800"}  # fmt: skip
