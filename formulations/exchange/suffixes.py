"""Choose the writer and reader of a problem file by its suffix.

    .lp .mps    the integer program, for MILP solvers                  linear_writer, linear_reader
    .cqm        dimod's constrained quadratic model                    quadratic_writer, quadratic_reader
    .bqm .qubo  bits and penalties, dimod's format and plain text      the same
    .npz        the problem itself, exactly                            formulations.problem

Files are written atomically. A problem that is read back has the same objective as the one that was written for every
choice (for ``.bqm`` and ``.qubo``: for every assignment of the bits).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from formulations.errors import EncodingError, FileFormatError
from formulations.exchange.linear_reader import read_linear
from formulations.exchange.linear_writer import write_lp, write_mps
from formulations.exchange.quadratic_reader import read_bqm, read_cqm, read_qubo
from formulations.exchange.quadratic_writer import ENCODING, write_bqm, write_cqm, write_qubo
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
    problem: Problem,
    path: AnyPath,
    *,
    encoding: str | None = None,
    prices: Mapping[str, float] | None = None,
    proven: bool = False,
) -> None:
    """Write a problem in the form given by the file's suffix.

    Args:
        problem: the problem to write.
        path: path of the file, ending in one of `SUFFIXES`.
        encoding: encoding of the bits in ``.bqm`` and ``.qubo`` files (see `formulations.to_bqm`); default domain-wall.
        prices: prices of the budgets in ``.bqm`` and ``.qubo`` files (see `formulations.to_bqm`).
        proven: whether the least energy in ``.bqm`` and ``.qubo`` files belongs to the best choice (see `write_bqm`).

    Raises:
        FileFormatError: the suffix is unknown.
        EncodingError: the problem cannot be converted to that form, or the form takes no encoding or prices.

    >>> import pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.cqm"
    >>> write_problem(problem, file)
    >>> read_problem(file).fingerprint() == problem.fingerprint()
    True
    """
    suffix = _suffix(path)
    if suffix in _BITS:
        _BITS[suffix](problem, path, encoding=encoding or ENCODING, prices=prices, proven=proven)
        return
    if encoding is not None or prices is not None or proven:
        raise EncodingError(f"a {suffix} file holds no bits; encoding, prices and proof are for {' and '.join(_BITS)}")
    _EXACT[suffix](problem, path)


def read_problem(path: AnyPath) -> Problem:
    """Read the problem in a file that `write_problem` wrote; ``.bqm`` and ``.qubo`` give the problem of their bits.

    Raises:
        FileFormatError: the suffix is unknown, or the file does not match its suffix or is incomplete.
    """
    return _READERS[_suffix(path)](path)


def _suffix(path: AnyPath) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise FileFormatError(f"{path}: the suffix says what a file holds; known are {', '.join(SUFFIXES)}")
    return suffix
