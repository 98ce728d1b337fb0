"""Read a `Problem` back from the LP and MPS files of `formulations.exchange.linear_writer`.

HiGHS parses the file. This module then recovers the problem from the linear program: the names of the variables give
options and products, the names of the rows give groups and budgets. A problem is restored as it was written (see
`formulations.exchange.linear_writer` for what the files keep). A model that does not come from a problem is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import FileFormatError
from formulations.exchange.linear_writer import CONSTANT, MARK, VERSION
from formulations.files import AnyPath
from formulations.pairs import PairTerms
from formulations.problem import Problem


def read_linear(path: AnyPath) -> Problem:
    """Read the problem in an LP or MPS file (distinguished by suffix) that `write_lp` or `write_mps` wrote.

    Costs, uses and budgets may have been edited since, but not rows, variables or their bounds.

    Raises:
        FileFormatError: the file is not such a file, or is incomplete.

    >>> import pathlib, tempfile
    >>> from formulations.exchange.linear_writer import write_mps
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.mps"
    >>> write_mps(problem, file)
    >>> read_linear(file).fingerprint() == problem.fingerprint()
    True
    """
    header = _header(Path(path))
    model = _parsed(Path(path))
    try:
        return _problem(header, model)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} does not hold a whole problem: {error}") from error


def _header(path: Path) -> dict[str, Any]:
    """Parse the JSON in the comments at the top."""
    parts = []
    with path.open("rb") as file:
        for line in file:
            sign, _, rest = line.decode("utf-8", errors="replace").rstrip("\r\n").lstrip().partition(" ")
            if sign not in ("\\", "*") or not rest.startswith(MARK):
                break
            parts.append(rest.removeprefix(MARK))
    try:
        header = json.loads("".join(parts))
        if header["version"] != VERSION:
            raise ValueError(f"this program reads version {VERSION}, the file has version {header['version']!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path} does not begin with the comments that hold a problem's names, as write_lp and write_mps "
            f"write them: {error}"
        ) from error
    return dict(header)


def _parsed(path: Path) -> Any:
    """Parse the file with HiGHS."""
    import highspy  # local import: only reading needs it

    highs = highspy.Highs()
    highs.silent()
    highs.setOptionValue("small_matrix_value", 1e-12)  # else uses below 1e-9 are dropped
    if highs.readModel(str(path)) != highspy.HighsStatus.kOk:
        raise FileFormatError(
            f"{path} is not a valid {path.suffix} file: HiGHS cannot read it, or cannot read every number exactly"
        )
    return highs.getLp()


def _problem(header: dict[str, Any], model: Any) -> Problem:
    groups = [str(name) for name, _ in header["groups"]]
    options = [[str(option) for option in names] for _, names in header["groups"]]
    first = np.concatenate([[0], np.cumsum([len(names) for names in options])])
    size, place = int(first[-1]), _places(model, first)
    _check(header, model)
    weight = np.array(model.col_cost_)
    cost, offset = np.zeros(size), float(model.offset_)
    rows, columns, values = [], [], []
    for name, value in zip(model.col_names_, weight.tolist(), strict=True):
        kind, u, v = place[name]
        if kind == "x":
            cost[u] = value
        elif kind == "y":
            rows.append(u)
            columns.append(v)
            values.append(value)
        else:
            offset += value
    sparse = scipy.sparse.csr_array((values, (rows, columns)), shape=(size, size)) if rows else None
    resources, budgets, fixed = _budgets(header, model, place, size)
    return Problem(groups, options, cost, resources, budgets, PairTerms(sparse=sparse), offset, fixed)


def _places(model: Any, first: NDArray[np.int64]) -> dict[str, tuple[str, int, int]]:
    """Map each variable to ("x", flat option, 0), ("y", u, v) or ("constant", 0, 0); every option occurs once."""
    place: dict[str, tuple[str, int, int]] = {}
    for name in model.col_names_:
        if name == CONSTANT:
            place[name] = ("constant", 0, 0)
        elif match := re.match(r"x_(\d+)_(\d+)_", name):
            group, option = int(match[1]), int(match[2])
            if option >= first[group + 1] - first[group]:
                raise ValueError(f"variable {name} is an option that its group does not have")
            place[name] = ("x", int(first[group]) + option, 0)
        elif match := re.fullmatch(r"y_(\d+)_(\d+)", name):
            place[name] = ("y", int(match[1]), int(match[2]))
        else:
            raise ValueError(f"variable {name} belongs to no problem")
    options = sorted(u for kind, u, _ in place.values() if kind == "x")
    if options != list(range(int(first[-1]))):
        raise ValueError(f"found variables for {len(options)} options, the header names {first[-1]}")
    return place


def _check(header: dict[str, Any], model: Any) -> None:
    """Refuse a model with content that the problem made of it cannot represent."""
    import highspy

    lower, upper = np.array(model.row_lower_), np.array(model.row_upper_)
    rows = dict(zip(model.row_names_, zip(lower.tolist(), upper.tolist(), strict=True), strict=True))
    ones = {f"one_{g}": (1.0, 1.0) for g in range(len(header["groups"]))}
    budgets = {f"budget_{k}" for k in range(len(header["budgets"]))}
    foreign = [name for name in rows if name not in ones and name not in budgets and not name.startswith("product_")]
    broken = [name for name, ends in ones.items() if rows.get(name) != ends]
    broken += [name for name in budgets if name not in rows or np.isfinite(rows[name][0])]
    if foreign or broken:
        raise ValueError(f"rows missing or changed: {broken[:3]}; rows that belong to no problem: {foreign[:3]}")
    least = np.array([float(name == CONSTANT) for name in model.col_names_])
    if model.sense_ != highspy.ObjSense.kMinimize:
        raise ValueError("the model maximises, a problem is minimised")
    if (np.array(model.col_lower_) != least).any() or (np.array(model.col_upper_) != 1.0).any():
        raise ValueError("a variable has other bounds than 0 and 1")


def _budgets(
    header: dict[str, Any], model: Any, place: dict[str, tuple[str, int, int]], size: int
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float], dict[str, float]]:
    """Return the uses of the options, the budgets and the fixed uses, each by resource."""
    row_of, matrix = {name: row for row, name in enumerate(model.row_names_)}, _matrix(model)
    column = {"constant": size, "y": size + 1}
    flat = np.array([column.get(place[name][0], place[name][1]) for name in model.col_names_])
    resources, budgets, fixed = {}, {}, {}
    for k, (name, unit) in enumerate(header["budgets"]):
        row = row_of[f"budget_{k}"]
        line = matrix[[row]].tocoo()
        use = np.zeros(size + 2)
        use[flat[line.coords[1]]] = line.data
        if use[size + 1]:
            raise ValueError(f"row budget_{k} holds variables that are not options")
        resources[str(name)] = use[:size] * unit
        budgets[str(name)] = float(model.row_upper_[row]) * unit
        fixed[str(name)] = float(use[size]) * unit
    return resources, budgets, fixed


def _matrix(model: Any) -> Any:
    import highspy

    parts = (np.array(model.a_matrix_.value_), np.array(model.a_matrix_.index_), np.array(model.a_matrix_.start_))
    shape = (model.num_row_, model.num_col_)
    if model.a_matrix_.format_ == highspy.MatrixFormat.kColwise:
        return scipy.sparse.csc_array(parts, shape=shape).tocsr()
    return scipy.sparse.csr_array(parts, shape=shape)
