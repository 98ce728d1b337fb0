"""Read published benchmark instances in their text formats, and restate them as a `Problem` to be minimised.

    max-cut             ``n m``, then a line ``i j weight`` per edge                              Gset, BiqMac
    QUBO                ``n m``, then a line ``i j q`` per entry; an off-diagonal entry counts twice    BiqMac, GKA
    Ising               ``n m``, then a line ``i j J`` per coupling and ``i i h`` per field           coordinate files
    QKP                 name, n, linear profits, upper triangle row by row, 0, capacity, weights  Billionnet and Soutif
    MKP                 ``n m best``, n profits, m rows of n weights, m capacities                OR-Library
    MMKP                ``groups options budgets``, capacities, then per group its number and a line per option
                        ``value use_1 … use_k``                                                   Khan et al.

Vertices and variables count from 1; words after ``n m`` and lines whose first sign is ``#`` are remarks, in UTF-8.
Parallel edges add up. A variable becomes a group with the two options "0" and "1". If the original problem is a
maximisation, its value is negated: a best known value ``v`` becomes the objective ``-v``.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import FileFormatError
from formulations.exchange.quadratic_reader import is_number, require_readable
from formulations.files import AnyPath
from formulations.pairs import PairTerms
from formulations.problem import Problem


def read_max_cut(path: AnyPath) -> Problem:
    """Read a maximum-cut instance: minimise ``-Σ w_ij·(x_i ≠ x_j)``.

    Raises:
        FileFormatError: a number is missing, or an edge names an unknown vertex.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "triangle.txt"
    >>> _ = file.write_text(chr(10).join(["3 3", "1 2 1", "2 3 1", "1 3 5"]))
    >>> read_max_cut(file).evaluate([0, 0, 1]).objective
    -6.0
    """

    def problem(words: list[str]) -> Problem:
        size, i, j, weight = _entries(words)
        if (i == j).any():
            raise ValueError("an edge joins a vertex to itself")
        linear = np.zeros(size)  # w·(x_i ≠ x_j) = w·x_i + w·x_j - 2·w·x_i·x_j
        np.subtract.at(linear, i, weight)
        np.subtract.at(linear, j, weight)
        return _binary(linear, i, j, 2.0 * weight)

    return _read(path, "max-cut", problem)


def read_coordinate_qubo(path: AnyPath) -> Problem:
    """Read a QUBO: minimise ``xᵀQx`` over bits; the file has the diagonal and one triangle of the symmetric Q.

    Raises:
        FileFormatError: a number is missing, an entry names an unknown variable, or one is given in both triangles.
    """

    def problem(words: list[str]) -> Problem:
        size, i, j, entry = _entries(words)
        above, below = np.unique((i * size + j)[i < j]), np.unique((j * size + i)[i > j])
        if twice := len(both := np.intersect1d(above, below, assume_unique=True)):
            raise ValueError(
                f"{twice} entries are given in both triangles, such as {both[0] // size + 1} {both[0] % size + 1}; "
                "give each in one of them: it counts twice"
            )
        linear = np.zeros(size)
        np.add.at(linear, i[i == j], entry[i == j])
        apart = i != j
        return _binary(linear, i[apart], j[apart], 2.0 * entry[apart])

    return _read(path, "a QUBO", problem)


def read_ising(path: AnyPath) -> Problem:
    """Read an Ising model: minimise ``Σ J_ij·s_i·s_j + Σ h_i·s_i`` over spins, option "0" for -1 and "1" for +1.

    Raises:
        FileFormatError: a number is missing, or an entry names an unknown spin.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.txt"
    >>> _ = file.write_text(chr(10).join(["2 2", "1 2 1.5", "1 1 -1"]))
    >>> read_ising(file).evaluate([1, 0]).objective
    -2.5
    """

    def problem(words: list[str]) -> Problem:
        size, i, j, value = _entries(words)
        linear = np.zeros(size)  # s = 2·x - 1
        alone = i == j
        np.add.at(linear, i[alone], 2.0 * value[alone])
        i, j, coupling = i[~alone], j[~alone], value[~alone]
        np.subtract.at(linear, i, 2.0 * coupling)
        np.subtract.at(linear, j, 2.0 * coupling)
        offset = math.fsum([*coupling.tolist(), *(-value[alone]).tolist()])
        return _binary(linear, i, j, 4.0 * coupling, offset=offset)

    return _read(path, "an Ising", problem)


def read_multidimensional_knapsack(path: AnyPath) -> Problem:
    """Read a multidimensional knapsack: the items with the largest total profit within several capacities.

    The file holds one problem. Its best known profit (0 if there is none) is not read. The capacities become the
    budgets of the resources ``use 1``, ``use 2``, ….

    Raises:
        FileFormatError: a number is missing, or there are more.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "three.txt"
    >>> _ = file.write_text(chr(10).join(["3 1 0", "6 5 4", "3 2 2", "4"]))
    >>> read_multidimensional_knapsack(file).evaluate([0, 1, 1]).objective
    -9.0
    """

    def problem(words: list[str]) -> Problem:
        items, budgets = _sizes(words, 2, "n m best")
        require_readable(items)
        numbers = np.array(words[3:], dtype=np.float64)
        count = items + budgets * (items + 1)
        if min(items, budgets) < 0 or len(numbers) != count:
            raise ValueError(f"{items} items and {budgets} capacities need {count} numbers, found {len(numbers)}")
        profits, weights, capacities = np.split(numbers, [items, count - budgets])
        names = [f"use {k + 1}" for k in range(budgets)]
        return Problem(
            [str(k + 1) for k in range(items)],
            [["0", "1"]] * items,
            _of_ones(-profits),
            dict(zip(names, map(_of_ones, weights.reshape(budgets, items)), strict=True)),
            dict(zip(names, capacities.tolist(), strict=True)),
        )

    return _read(path, "a multidimensional knapsack", problem)


def read_quadratic_knapsack(path: AnyPath) -> Problem:
    """Read a quadratic knapsack: the items with the largest total linear and pairwise profit within a capacity.

    The capacity becomes the budget of the resource ``weight``.

    Raises:
        FileFormatError: a number is missing.
    """

    def problem(words: list[str]) -> Problem:
        (size,) = _sizes(words[1:], 1, "a name and n")
        count = size + size * (size - 1) // 2 + 2 + size
        numbers = np.array(words[2 : 2 + count], dtype=np.float64)
        if len(numbers) < count:
            raise ValueError(f"{size} items need {count} numbers, found {len(numbers)}")
        linear, pairs, (kind, capacity), weight = np.split(numbers, [size, count - size - 2, count - size])
        if kind != 0:
            raise ValueError(f"only upper limits (kind 0) can be read as capacities, found kind {kind:g}")
        i, j = np.triu_indices(size, 1)
        return _binary(-linear, i, j, -pairs, weight=weight, capacity=float(capacity))

    return _read(path, "a quadratic knapsack", problem)


def read_multiple_choice_knapsack(path: AnyPath) -> Problem:
    """Read a multiple-choice knapsack: one item per group, with the largest total value within several capacities.

    The capacities become the budgets of the resources ``use 1``, ``use 2``, …, the groups' numbers their names.

    Raises:
        FileFormatError: a number is missing, or two groups have the same one.
    """

    def problem(words: list[str]) -> Problem:
        groups, options, budgets = _sizes(words, 3, "groups options budgets")
        require_readable(max(groups, options))
        rest = words[3:]
        if not 0 <= budgets <= len(rest):
            raise ValueError(f"{budgets} budgets need as many capacities, found {len(rest)} numbers")
        each = 1 + options * (1 + budgets)
        capacities, rest = np.array(rest[:budgets], dtype=np.float64), rest[budgets:]
        if len(rest) != groups * each:
            raise ValueError(
                f"{groups} groups of {options} options need {groups * each} numbers after the capacities, "
                f"found {len(rest)}"
            )
        numbers = [word for g in range(groups) for word in rest[g * each + 1 : (g + 1) * each]]
        rows = np.array(numbers, dtype=np.float64).reshape(groups * options, 1 + budgets)
        names = [f"use {k + 1}" for k in range(budgets)]
        return Problem(
            [_group_number(word) for word in rest[::each]],
            [[str(option + 1) for option in range(options)]] * groups,
            -rows[:, 0],
            dict(zip(names, rows[:, 1:].T, strict=True)),
            dict(zip(names, capacities.tolist(), strict=True)),
        )

    return _read(path, "a multiple-choice multidimensional knapsack", problem)


def _read(path: AnyPath, what: str, build: Callable[[list[str]], Problem]) -> Problem:
    content = Path(path).read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
        words = [word for line in lines if not line.lstrip().startswith("#") for word in line.split()]
        with np.errstate(over="ignore", invalid="ignore"):  # a problem refuses numbers that are not finite
            return build(words)
    except (OverflowError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise FileFormatError(f"{path} is not {what} instance, or is incomplete: {error}") from error


def _sizes(words: list[str], count: int, wanted: str) -> list[int]:
    """Parse the first ``count`` words, which ``wanted`` names, as whole numbers."""
    try:
        sizes = [int(word) for word in words[:count]]
    except ValueError:
        sizes = []
    if len(sizes) < count:
        raise ValueError(f"it should begin with {wanted} in whole numbers, found {' '.join(words[:count])!r}")
    return sizes


def _entries(words: list[str]) -> tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Parse text that begins with ``n m`` into the size and the entries ``(i, j, value)``, counted from 0."""
    size, count = _sizes(words, 2, "n m")
    require_readable(size)
    remarks = next((number for number, word in enumerate(words[2:]) if is_number(word)), len(words) - 2)
    numbers = words[2 + remarks :]  # some files have remarks after n and m
    if len(numbers) != 3 * count:
        raise ValueError(f"{count} entries need {3 * count} numbers, found {len(numbers)}")
    table = np.array(numbers, dtype=np.float64).reshape(count, 3)
    places = table[:, :2]
    least, most = places.min(initial=1), places.max(initial=0)
    if not (least >= 1 and most <= size):
        raise ValueError(f"entries lie between 1 and {size}, found {least:g} to {most:g}")
    if (broken := places[places != np.floor(places)]).size:
        raise ValueError(f"vertices and variables are whole numbers, found {broken[0]:g}")
    i, j = places.astype(np.int64).T - 1
    return size, i, j, table[:, 2]


def _group_number(word: str) -> str:
    try:
        return str(int(word))
    except ValueError:
        raise ValueError(f"numbers of groups are whole, found {word!r}") from None


def _binary(
    linear: NDArray[np.float64],
    i: NDArray[np.int64],
    j: NDArray[np.int64],
    value: NDArray[np.float64],
    *,
    weight: NDArray[np.float64] | None = None,
    capacity: float = 0.0,
    offset: float = 0.0,
) -> Problem:
    """Build a problem of bits with linear terms, pair terms ``value·x_i·x_j`` (duplicates add up), and a capacity."""
    size = len(linear)
    places = 2 * np.minimum(i, j) + 1, 2 * np.maximum(i, j) + 1
    kept = value != 0
    sparse = scipy.sparse.csr_array((value[kept], (places[0][kept], places[1][kept])), shape=(2 * size, 2 * size))
    return Problem(
        [str(k + 1) for k in range(size)],
        [["0", "1"]] * size,
        _of_ones(linear),
        {} if weight is None else {"weight": _of_ones(weight)},
        {} if weight is None else {"weight": capacity},
        PairTerms(sparse=sparse) if sparse.nnz else None,
        offset=offset,
    )


def _of_ones(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers of the options "1" of bits, between zeros for the options "0"."""
    return np.column_stack([np.zeros(len(numbers)), numbers]).ravel()
