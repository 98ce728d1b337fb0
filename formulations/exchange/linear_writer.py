"""Write the integer program of a `Problem` as LP and MPS files, for any MILP solver.

`formulations.exchange.linear_reader` reads these files. The model is that of `formulations.forms.integer_program`:
``x_<g>_<i>_<names>`` is 1 if option i of group g is chosen, ``y_<u>_<v>`` is the product of the flat options u and v.
Numbers are written so that they are restored bit for bit (PuLP's writers keep 12 digits and drop the constant of the
objective). Names are reduced to characters that every reader accepts, with indices in front to keep them distinct; the
original names are stored as JSON in comments at the top.

The files keep groups, options, costs, the offset, budgets with their resources and fixed uses, and the pair terms (as a
sparse part only: the products of a factor are expanded). They do not keep resources without a budget. Budget rows and
objective are in the problem's units, except that a resource whose uses are all below 1 is scaled by a power of two,
because solvers compare rows with absolute tolerances. An objective below about 1e-4 is too small for solvers: scale
the problem first. Numbers that HiGHS takes for infinite are refused.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from formulations.errors import EncodingError
from formulations.exchange.bits import refuse_paired_budgets
from formulations.files import AnyPath, replacing
from formulations.forms.integer_program import IntegerProgram, to_integer_program
from formulations.problem import Problem

MARK = "qcompress "
"""Prefix of the comments with the names, after the format's comment sign."""

VERSION = 1
COMMENT_WIDTH = 200
TERMS_IN_A_LINE = 6
NAME_PART = 40
CONSTANT = "constant"
"""Variable fixed to 1 that carries the offset and fixed uses (not every reader accepts a bare constant)."""

LARGEST, LARGEST_IN_ROW = 1e20, 1e15
"""From these on, HiGHS takes numbers in the objective and right-hand sides for infinite, and refuses coefficients."""

Terms = list[tuple[str, float]]


class _Row(NamedTuple):
    name: str
    terms: Terms
    sense: str  # "<=", ">=", "="
    rhs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """The content that both formats share."""

    header: str
    objective: Terms
    rows: list[_Row]
    binary: list[str]
    products: list[str]
    constant: bool  # whether there is a variable for constants


def write_lp(problem: Problem, path: AnyPath) -> None:
    """Write the integer program in CPLEX's LP format, atomically.

    Raises:
        EncodingError: a budget has pair terms, the pair terms need too many products (see `to_integer_program`), or a
            number is too large for readers of the format.

    >>> import pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.lp"
    >>> write_lp(problem, file)
    >>> file.read_text().splitlines()[-10]
    ' budget_0: + 8.0 x_0_0_a_keep + 4.0 x_0_1_a_4_bit + 8.0 x_1_0_b_keep + 4.0 x_1_1_b_4_bit <= 12.0'
    """
    program = _program(problem)
    _write(path, _lp_lines(program))


def write_mps(problem: Problem, path: AnyPath) -> None:
    """Write the integer program in free MPS format, atomically.

    Raises:
        EncodingError: a budget has pair terms, the pair terms need too many products (see `to_integer_program`), or a
            number is too large for readers of the format.
    """
    program = _program(problem)
    _write(path, _mps_lines(program))


def _program(problem: Problem) -> _Program:
    refuse_paired_budgets(problem, "an LP or MPS file")
    program = to_integer_program(problem)
    names = {x.name: name for x, name in zip(program.x, _option_names(problem), strict=True)}
    names |= {y.name: f"y_{u}_{v}" for y, u, v in program.y}
    weights = {variable.name: float(weight) for variable, weight in program.model.objective.items()}
    objective = [(name, weights.get(variable, 0.0)) for variable, name in names.items()]
    constant = bool(problem.offset or set(problem.fixed) & set(problem.budgets))
    if constant:
        objective.append((CONSTANT, problem.offset))
    units = [_unit(problem.resources[name]) for name in problem.budgets]
    header = {
        "version": VERSION,
        "groups": [[group, list(options)] for group, options in zip(problem.groups, problem.options, strict=True)],
        "budgets": [[name, unit] for name, unit in zip(problem.budgets, units, strict=True)],
    }
    rows = [*_budget_rows(problem, list(names.values()), units), *_other_rows(program, names)]
    _refuse_unreadable(problem, objective, rows)
    return _Program(
        header=json.dumps(header),
        objective=objective,
        rows=rows,
        binary=[names[x.name] for x in program.x],
        products=[names[y.name] for y, _, _ in program.y],
        constant=constant,
    )


def _refuse_unreadable(problem: Problem, objective: Terms, rows: list[_Row]) -> None:
    wrong = [("the objective", name, weight) for name, weight in objective if abs(weight) >= LARGEST]
    for row, resource in zip(rows, problem.budgets, strict=False):  # the other rows hold ones
        where = f"the budget of {resource!r}"
        wrong += [(where, "right-hand side", row.rhs)] if abs(row.rhs) >= LARGEST else []
        wrong += [(where, name, weight) for name, weight in row.terms if abs(weight) >= LARGEST_IN_ROW]
    if wrong:
        where, name, number = wrong[0]
        raise EncodingError(
            f"LP and MPS readers take numbers below {LARGEST:g}, and uses below {LARGEST_IN_ROW:g}; "
            f"{where} has {number:g} ({name}). Write an .npz or .cqm file, or change the unit"
        )


def _option_names(problem: Problem) -> Iterator[str]:
    for g, (group, options) in enumerate(zip(problem.groups, problem.options, strict=True)):
        for i, option in enumerate(options):
            yield "_".join([f"x_{g}_{i}", *(re.sub(r"[^A-Za-z0-9]+", "_", n)[:NAME_PART] for n in (group, option))])


def _unit(use: NDArray[np.float64]) -> float:
    largest = float(use.max())
    return 2.0 ** math.floor(math.log2(largest)) if 0 < largest < 1 else 1.0


def _budget_rows(problem: Problem, names: list[str], units: list[float]) -> Iterator[_Row]:
    """Yield the budgets without the tolerance that `to_integer_program` adds, so that they are restored exactly."""
    for k, ((resource, budget), unit) in enumerate(zip(problem.budgets.items(), units, strict=True)):
        use = problem.resources[resource]
        terms = [(names[v], float(use[v] / unit)) for v in np.flatnonzero(use)]
        if resource in problem.fixed:
            terms.append((CONSTANT, problem.fixed[resource] / unit))
        yield _Row(f"budget_{k}", terms or [(names[0], 0.0)], "<=", budget / unit)


def _other_rows(program: IntegerProgram, names: dict[str, str]) -> Iterator[_Row]:
    senses = {0: "=", -1: "<=", 1: ">="}
    for row in program.model.constraints():
        if not row.name.startswith("budget_"):
            terms = [(names[variable.name], float(weight)) for variable, weight in row.items()]
            yield _Row(row.name, terms, senses[row.sense], -float(row.constant))


def _write(path: AnyPath, lines: Iterable[str]) -> None:
    with replacing(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def _comments(sign: str, header: str) -> Iterator[str]:
    for begin in range(0, len(header), COMMENT_WIDTH):
        yield f"{sign} {MARK}{header[begin : begin + COMMENT_WIDTH]}"


def _lp_lines(program: _Program) -> Iterator[str]:
    yield from _comments("\\", program.header)
    yield "Minimize"
    yield from _lp_sum("objective", program.objective, "")
    yield "Subject To"
    for row in program.rows:
        yield from _lp_sum(row.name, row.terms, f" {row.sense} {row.rhs!r}")
    yield "Bounds"
    for name in program.products:
        yield f" 0 <= {name} <= 1"
    if program.constant:
        yield f" {CONSTANT} = 1"
    yield "Binaries"
    for name in program.binary:
        yield f" {name}"
    yield "End"


def _lp_sum(name: str, terms: Terms, end: str) -> Iterator[str]:
    words = [f"{'-' if weight < 0 else '+'} {abs(weight)!r} {variable}" for variable, weight in terms]
    words[0] = f"{name}: {words[0]}"
    words[-1] += end
    for begin in range(0, len(words), TERMS_IN_A_LINE):
        yield f" {' '.join(words[begin : begin + TERMS_IN_A_LINE])}"


def _mps_lines(program: _Program) -> Iterator[str]:
    yield from _comments("*", program.header)
    yield "NAME qcompress"
    yield "ROWS"
    yield " N objective"
    kinds = {"=": "E", "<=": "L", ">=": "G"}
    for row in program.rows:
        yield f" {kinds[row.sense]} {row.name}"
    columns = {name: [("objective", weight)] for name, weight in program.objective}
    for row in program.rows:
        for variable, weight in row.terms:
            columns[variable].append((row.name, weight))
    yield "COLUMNS"
    yield " MARKER 'MARKER' 'INTORG'"
    for name in program.binary:
        for row_name, weight in columns.pop(name):
            yield f" {name} {row_name} {weight!r}"
    yield " MARKER 'MARKER' 'INTEND'"
    for name, entries in columns.items():
        for row_name, weight in entries:
            yield f" {name} {row_name} {weight!r}"
    yield "RHS"
    for row in program.rows:
        yield f" RHS {row.name} {row.rhs!r}"
    yield "BOUNDS"
    for name in program.binary:
        yield f" BV BOUND {name}"
    for name in program.products:
        yield f" UP BOUND {name} 1.0"
    if program.constant:
        yield f" FX BOUND {CONSTANT} 1.0"
    yield "ENDATA"
