"""Write a `Problem` as dimod's CQM and BQM files and as QUBO coordinate text.

`formulations.exchange.quadratic_reader` reads these files. A **CQM** file states the problem itself, with variables
named ``(group, option)``. Everything is restored except resources without a budget, the order of the budgets (they are
sorted by name), and the factor, whose products are expanded. A **BQM** or **QUBO** file holds the bits of an encoding
with penalties (`formulations.to_bqm`), from which groups and budgets cannot be recovered. To convert a sample to a
choice, call ``to_bqm(problem, ...).decode`` with the same arguments.

QUBO text is in qbsolv's format: comments (``c``), a line ``p qubo 0 <variables> <diagonal entries> <couplers>``, then a
line ``i i bias`` for each variable and ``i j bias`` with i < j for each coupler, counted from 0. The energy is the sum
of the biases over the bits that are 1, plus the number in the comment ``c offset``.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

from formulations.files import AnyPath, replacing
from formulations.problem import Problem

Prices = Mapping[str, float]

COPY_BYTES = 2**20


def write_cqm(problem: Problem, path: AnyPath) -> None:
    """Write the constrained quadratic model in dimod's format, atomically.

    >>> import dimod, pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.cqm"
    >>> write_cqm(problem, file)
    >>> list(dimod.ConstrainedQuadraticModel.from_file(file.read_bytes()).variables)[:2]
    [('a', 'keep'), ('a', '4 bit')]
    """
    from formulations.forms.cqm_file import cqm_file

    with cqm_file(problem) as model, replacing(path) as file:
        with zipfile.ZipFile(model, "a") as archive:
            archive.writestr("variable_labels.json", json.dumps(list(_labels(problem))))
        model.seek(0)
        while block := model.read(COPY_BYTES):
            file.write(block)


def write_bqm(problem: Problem, path: AnyPath, *, encoding: str = "one-hot", prices: Prices | None = None) -> None:
    """Write the binary quadratic model in dimod's format, atomically.

    Args:
        problem: the problem to encode.
        path: path of the file.
        encoding: name of the encoding, same as in `formulations.to_bqm`.
        prices: prices of the budgets, same as in `formulations.to_bqm`; needed if uses are not whole numbers.

    Raises:
        EncodingError: see `formulations.to_bqm`.
    """
    from formulations.forms.bqm import to_bqm

    bqm = to_bqm(problem, encoding, prices=prices).bqm
    with bqm.to_file() as model, replacing(path) as file:
        while block := model.read(COPY_BYTES):
            file.write(block)


def write_qubo(problem: Problem, path: AnyPath, *, encoding: str = "one-hot", prices: Prices | None = None) -> None:
    """Write the QUBO as coordinate text (see the module's docstring), atomically; the arguments are as in `write_bqm`.

    Raises:
        EncodingError: see `formulations.to_bqm`.

    >>> import pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "prune"]] * 2, [0, 3, 0, 1], {}, {}, None, 0.5)
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.qubo"
    >>> write_qubo(problem, file, encoding="domain-wall")
    >>> print(file.read_text(), end="")
    c 2 groups, 4 options as bits: encoding domain-wall, prices None
    c offset 0.5
    p qubo 0 2 2 0
    0 0 3.0
    1 1 1.0
    """
    from formulations.forms.bqm import to_bqm

    bqm = to_bqm(problem, encoding, prices=prices).bqm
    linear, (rows, columns, values), offset = bqm.to_numpy_vectors(variable_order=range(bqm.num_variables))
    about = f"{problem.num_groups} groups, {problem.num_options} options as bits"
    with replacing(path) as file:
        stated_prices = None if prices is None else dict(prices)
        file.write(f"c {about}: encoding {encoding}, prices {stated_prices}\n".encode())
        file.write(f"c offset {float(offset)!r}\np qubo 0 {len(linear)} {len(linear)} {len(values)}\n".encode())
        file.writelines(f"{i} {i} {bias!r}\n".encode() for i, bias in enumerate(linear.tolist()))
        first, second = np.minimum(rows, columns).tolist(), np.maximum(rows, columns).tolist()
        couplers = zip(first, second, values.tolist(), strict=True)
        file.writelines(f"{i} {j} {bias!r}\n".encode() for i, j, bias in couplers)


def _labels(problem: Problem) -> Iterator[tuple[str, str]]:
    for group, options in zip(problem.groups, problem.options, strict=True):
        for option in options:
            yield group, option
