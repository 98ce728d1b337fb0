"""Files for other tools: which suffix stands for which form, and what writes and reads it.

    .lp .mps    the integer program, for MILP solvers                  linear_writer, linear_reader
    .cqm        dimod's constrained quadratic model                    quadratic_writer, quadratic_reader
    .bqm .qubo  bits and penalties, dimod's format and plain text      the same
    .npz        the problem itself, exactly                            formulations.problem

What always holds: a file is written whole or not at all; what is read back has the objective of what was written for
every choice (for ``.bqm`` and ``.qubo``: for every assignment of the bits).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from formulations.errors import EncodingError, FileFormatError
from formulations.exchange.linear_reader import read_linear
from formulations.exchange.linear_writer import write_lp, write_mps
from formulations.exchange.quadratic_reader import read_bqm, read_cqm, read_qubo
from formulations.exchange.quadratic_writer import write_bqm, write_cqm, write_qubo
from formulations.files import AnyPath
from formulations.problem import Problem

__all__ = ["SUFFIXES", "read_problem", "write_bqm", "write_cqm", "write_lp", "write_mps", "write_problem", "write_qubo"]

_EXACT: dict[str, Callable[[Problem, AnyPath], None]] = {
    ".lp": write_lp,
    ".mps": write_mps,
    ".cqm": write_cqm,
    ".npz": Problem.save,
}
_BITS = {".bqm": write_bqm, ".qubo": write_qubo}
_READERS: dict[str, Callable[[AnyPath], Problem]] = {
    ".lp": read_linear,
    ".mps": read_linear,
    ".cqm": read_cqm,
    ".bqm": read_bqm,
    ".qubo": read_qubo,
    ".npz": Problem.load,
}

SUFFIXES = tuple(_READERS)


def write_problem(
    problem: Problem, path: AnyPath, *, encoding: str | None = None, prices: Mapping[str, float] | None = None
) -> None:
    """Write a problem in the form that the file's suffix stands for.

    Args:
        problem: what to write.
        path: ends in one of `SUFFIXES`.
        encoding: of the bits in ``.bqm`` and ``.qubo`` (see `formulations.to_bqm`); one-hot when not given.
        prices: of the budgets in ``.bqm`` and ``.qubo`` (see `formulations.to_bqm`).

    Raises:
        FileFormatError: another suffix.
        EncodingError: the problem cannot be put into that form, or the form has no encoding and prices.

    >>> import pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.cqm"
    >>> write_problem(problem, file)
    >>> read_problem(file).fingerprint() == problem.fingerprint()
    True
    """
    suffix = _suffix(path)
    if suffix in _BITS:
        _BITS[suffix](problem, path, encoding=encoding or "one-hot", prices=prices)
        return
    if encoding is not None or prices is not None:
        raise EncodingError(f"a {suffix} file holds no bits; encoding and prices are for {' and '.join(_BITS)}")
    _EXACT[suffix](problem, path)


def read_problem(path: AnyPath) -> Problem:
    """The problem in a file that `write_problem` wrote; of ``.bqm`` and ``.qubo`` the problem of their bits.

    Raises:
        FileFormatError: another suffix, or the file is not what its suffix says, or not a whole one.
    """
    return _READERS[_suffix(path)](path)


def _suffix(path: AnyPath) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise FileFormatError(f"{path}: the suffix says what a file holds; known are {', '.join(SUFFIXES)}")
    return suffix
