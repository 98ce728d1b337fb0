"""Read problems from dimod's CQM and BQM files and from QUBO coordinate text, written by this package or others.

A CQM is restored as the problem that it states. A BQM or QUBO becomes a new problem whose objective is the energy
(divided by the scale that `formulations.exchange.bits` wrote, if it did): one group per bit with the options "0" and
"1", and no budget. Every solver can therefore solve any QUBO. For every choice the objective equals that of the model.
A model of another form is refused.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import FileFormatError
from formulations.exchange.bits import metadata_of
from formulations.files import AnyPath
from formulations.pairs import PairTerms
from formulations.problem import Problem

if TYPE_CHECKING:
    import dimod

Value = TypeVar("Value")

MOST_VARIABLES = 10_000_000
"""Of a text: a damaged size would fill the memory before anything else could be noticed."""


def read_cqm(path: AnyPath) -> Problem:
    """Read the problem in a CQM file that `write_cqm` wrote, or any other CQM of the same form.

    In this form every variable is binary and occurs in exactly one constraint "one of these" (``= 1``). Every other
    constraint is linear, ``<=``, with coefficients that are not negative. A variable whose name is not (group, option)
    becomes an option with the variable's name.

    Raises:
        FileFormatError: the file is not a CQM of this form, or is incomplete.
    """
    import dimod

    def build() -> Problem:
        return _problem_of_cqm(dimod.ConstrainedQuadraticModel.from_file(Path(path).read_bytes()))

    return _read(path, "a CQM file of groups and budgets", build)


def read_bqm(path: AnyPath) -> Problem:
    """Read a BQM file as a problem with one group per bit and no budget (spins are converted to bits).

    Raises:
        FileFormatError: the file is not a BQM, or is incomplete.
    """
    import dimod

    def build() -> Problem:
        content = Path(path).read_bytes()
        bqm = dimod.BinaryQuadraticModel.from_file(io.BytesIO(content))
        bqm.scale(_unscaled(content, path))
        return _problem_of_bits(bqm.change_vartype(dimod.BINARY, inplace=False))

    return _read(path, "a BQM file", build)


def read_qubo(path: AnyPath) -> Problem:
    """Read a QUBO in coordinate text as a problem with one group per bit and no budget.

    The format is described in `formulations.exchange.quadratic_writer`. In addition, the ``p`` line may be missing, the
    indices of a coupler may be in either order, entries with the same indices add up, and comments may begin with
    ``#``. A comment ``c offset`` counts only if exactly one number follows.

    Raises:
        FileFormatError: a line is not a valid entry, or the number of entries differs from the ``p`` line.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "other.qubo"
    >>> _ = file.write_text(chr(10).join(["0 0 -1", "1 1 -1", "0 1 2.5"]))
    >>> read_qubo(file).evaluate([1, 1]).objective
    0.5
    """

    def build() -> Problem:
        content = Path(path).read_bytes()
        return _problem_of_text(content.decode().splitlines(), _unscaled(content, path))

    return _read(path, "QUBO coordinate text", build)


def require_readable(size: int) -> None:
    """Refuse more than `MOST_VARIABLES`, before anything of that size is made."""
    if size > MOST_VARIABLES:
        raise ValueError(f"at most {MOST_VARIABLES:,} variables can be read, found {size:,}")


def is_number(word: str) -> bool:
    """Whether a word of a text is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _unscaled(content: bytes, path: AnyPath) -> float:
    """Return the factor that turns energies of a file into those of the model."""
    bits = metadata_of(io.BytesIO(content), str(path))
    return 1.0 if bits is None else 1.0 / bits.scale


def _read(path: AnyPath, what: str, build: Callable[[], Value]) -> Value:
    try:
        return build()
    except (MemoryError, OSError):
        raise
    except Exception as error:  # dimod raises many kinds of exceptions for damaged files
        raise FileFormatError(f"{path} is not {what}, or is incomplete: {error}") from error


# --- from CQM ------------------------------------------------------------------------------------------------------


def _problem_of_cqm(cqm: "dimod.ConstrainedQuadraticModel") -> Problem:
    import dimod

    group_rows, budget_rows = [], []
    for label, constraint in cqm.constraints.items():
        row = constraint.lhs
        budget = constraint.sense is dimod.sym.Sense.Le
        if row.is_soft() or row.num_interactions or (row.offset and not budget):
            raise ValueError(f"constraint {label!r} is soft or not linear")
        if constraint.sense is dimod.sym.Sense.Eq and constraint.rhs == 1 and set(row.linear.values()) == {1.0}:
            group_rows.append((label, list(row.variables)))
        elif budget:
            name = _without("budget ", label)
            budget_rows.append((name, dict(row.linear), float(constraint.rhs), float(row.offset)))
        else:
            raise ValueError(f"constraint {label!r} is neither 'one of these' nor a budget")
    if not_binary := [v for v in cqm.variables if cqm.vartype(v) is not dimod.BINARY]:
        raise ValueError(f"variable {not_binary[0]!r} is not binary")
    place = {variable: v for v, variable in enumerate(cqm.variables)}
    group_rows.sort(key=lambda row: min(place[variable] for variable in row[1]))
    order = [variable for _, variables in group_rows for variable in sorted(variables, key=place.__getitem__)]
    if sorted(map(place.__getitem__, order)) != list(range(len(place))):
        raise ValueError("every variable must occur in exactly one one-hot equation")
    flat = {variable: v for v, variable in enumerate(order)}
    budget_rows.sort(key=lambda row: row[0])
    if len({name for name, *_ in budget_rows}) < len(budget_rows):
        raise ValueError("two budgets have the same name")
    bqm = dimod.BinaryQuadraticModel(cqm.objective.linear, cqm.objective.quadratic, cqm.objective.offset, dimod.BINARY)
    bqm.add_linear_from((variable, 0.0) for variable in order)  # variables that the objective lacks
    linear, couplers, offset = bqm.to_numpy_vectors(variable_order=order)
    group_of = np.repeat(np.arange(len(group_rows)), [len(variables) for _, variables in group_rows])
    return Problem(
        [_without("group ", label) for label, _ in group_rows],
        [[_option(v) for v in order[a:b]] for a, b in _ranges(group_of)],
        linear,
        {name: _spread(uses, flat) for name, uses, _, _ in budget_rows},
        {name: budget for name, _, budget, _ in budget_rows},
        PairTerms(sparse=_upper(couplers, len(order), group_of)),
        float(offset),
        {name: fixed for name, _, _, fixed in budget_rows},
    )


def _without(prefix: str, label: Any) -> str:
    return str(label).removeprefix(prefix)


def _option(variable: Any) -> str:
    """Return the option of a variable named (group, option), and the whole name of any other variable."""
    return str(variable[1]) if isinstance(variable, tuple) and len(variable) == 2 else str(variable)


def _ranges(group_of: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(np.bincount(group_of)).tolist()
    yield from zip([0, *ends[:-1]], ends, strict=True)


def _spread(uses: Mapping[Any, float], flat: Mapping[Any, int]) -> NDArray[np.float64]:
    use = np.zeros(len(flat))
    for variable, amount in uses.items():
        use[flat[variable]] = amount
    return use


# --- from bits -----------------------------------------------------------------------------------------------------


def _problem_of_bits(bqm: "dimod.BinaryQuadraticModel") -> Problem:
    linear, couplers, offset = bqm.to_numpy_vectors(variable_order=list(bqm.variables))
    return _two_options([str(variable) for variable in bqm.variables], linear, couplers, float(offset))


def _problem_of_text(lines: Sequence[str], factor: float = 1.0) -> Problem:
    offset, announced, entries = 0.0, None, []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words[:2] == ["c", "offset"] and len(words) == 3 and is_number(words[2]):
            offset = float(words[2])
        elif words[:1] == ["p"]:
            announced = _announced(number, line)
        elif words and not (words[0] == "c" or words[0].startswith("#")):
            try:
                i, j, bias = words
                entries.append((int(i), int(j), float(bias)))
            except ValueError as error:
                raise ValueError(f"line {number} should be 'i j bias', found {line!r}") from error
    if not entries:
        raise ValueError("it has no entries")
    rows, columns = (np.array(places, dtype=np.int64) for places in list(zip(*entries, strict=True))[:2])
    values = np.array([bias for _, _, bias in entries], dtype=np.float64)
    if min(rows.min(), columns.min()) < 0:
        raise ValueError("variables are counted from 0, found a negative one")
    size = int(max(rows.max(), columns.max())) + 1
    diagonal = rows == columns
    if announced is not None:
        counts = (int(diagonal.sum()), int((~diagonal).sum()))
        if announced[1:] != counts or size > announced[0]:
            raise ValueError(
                f"the p line announces {announced[1]} diagonal entries and {announced[2]} couplers of {announced[0]} "
                f"variables; found {counts[0]} and {counts[1]} of {size}"
            )
        size = announced[0]
    require_readable(size)
    linear = np.bincount(rows[diagonal], weights=values[diagonal], minlength=size).astype(np.float64)
    couplers = (rows[~diagonal], columns[~diagonal], factor * values[~diagonal])
    return _two_options([str(v) for v in range(size)], factor * linear, couplers, factor * offset)


def _announced(number: int, line: str) -> tuple[int, int, int]:
    """Return the numbers of variables, diagonal entries and couplers in a ``p`` line."""
    try:
        _, kind, _, size, diagonal, couplers = line.split()
        if kind == "qubo":
            return int(size), int(diagonal), int(couplers)
    except ValueError:
        pass
    raise ValueError(f"line {number} should be 'p qubo 0 variables diagonals couplers', found {line!r}")


def _two_options(names: list[str], linear: NDArray[np.float64], couplers: Any, offset: float) -> Problem:
    """Build a problem with one group per bit, whose second option means that the bit is 1."""
    size = len(names)
    cost = np.stack([np.zeros(size), linear], axis=1).ravel()
    rows, columns, values = couplers
    sparse = _upper((2 * rows + 1, 2 * columns + 1, values), 2 * size, np.arange(2 * size) // 2)
    return Problem(names, [["0", "1"]] * size, cost, {}, {}, PairTerms(sparse=sparse), offset)


def _upper(couplers: Any, size: int, group_of: NDArray[np.int64]) -> Any:
    """Return the couplers between groups as a strictly upper triangular matrix, or None when there are none."""
    rows, columns, values = (np.asarray(part) for part in couplers)
    between = group_of[rows] != group_of[columns]
    if not between.any():
        return None
    upper = (np.minimum(rows, columns)[between], np.maximum(rows, columns)[between])
    return scipy.sparse.csr_array((values[between], upper), shape=(size, size))
