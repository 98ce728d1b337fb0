"""Write a `Problem` as dimod's CQM and BQM files and as QUBO coordinate text.

`formulations.exchange.quadratic_reader` reads these files. A **CQM** file states the problem itself, with variables
named ``(group, option)``. Everything is restored except resources without a budget, the order of the budgets (they are
sorted by name), and the factor, whose products are expanded. A **BQM** or **QUBO** file holds the bits of an encoding
with penalties, from which groups and budgets cannot be recovered. It states how it was written, and
`formulations.decode_bits` converts samples to choices.

Budgets are enforced in a form that suits annealers (`formulations.forms.tight_budgets`). It proves nothing: a sample
may stand for a choice that exceeds a budget. With ``proven`` the least energy belongs to the best choice
(`formulations.to_bqm` without prices), but biases differ by factors of 10⁹. With prices, budgets are only priced.
Energies are scaled by a power of two, so that the largest bias is between 0.5 and 1.

QUBO text is in qbsolv's format: comments (``c``), a line ``p qubo 0 <variables> <diagonal entries> <couplers>``, then a
line ``i i bias`` for each variable and ``i j bias`` with i < j for each coupler, counted from 0. The energy is the sum
of the biases over the bits that are 1, plus the number in the comment ``c offset``. Divided by the number in ``c
scale``, it is the objective if the bits stand for a choice that meets its budgets exactly.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping

import numpy as np

from formulations.exchange.bits import COMMENT, in_bits, refuse_paired_budgets, with_entry
from formulations.files import AnyPath, replacing
from formulations.problem import Problem

Prices = Mapping[str, float]

ENCODING = "domain-wall"
"""In which single flips, an annealer's moves, change from one option to the next."""


def write_cqm(problem: Problem, path: AnyPath) -> None:
    """Write the constrained quadratic model in dimod's format, atomically.

    Raises:
        EncodingError: a budget has pair terms.

    >>> import dimod, pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.cqm"
    >>> write_cqm(problem, file)
    >>> list(dimod.ConstrainedQuadraticModel.from_file(file.read_bytes()).variables)[:2]
    [('a', 'keep'), ('a', '4 bit')]
    """
    from formulations.forms.cqm_file import cqm_file

    refuse_paired_budgets(problem, "a CQM file")
    groups = zip(problem.groups, problem.options, strict=True)
    labels = [(group, option) for group, options in groups for option in options]
    with cqm_file(problem) as model, replacing(path) as file:
        with zipfile.ZipFile(model, "a") as archive:
            archive.writestr("variable_labels.json", json.dumps(labels))
        model.seek(0)
        shutil.copyfileobj(model, file)


def write_bqm(
    problem: Problem,
    path: AnyPath,
    *,
    encoding: str = ENCODING,
    prices: Prices | None = None,
    proven: bool = False,
) -> None:
    """Write the binary quadratic model in dimod's format, atomically.

    Args:
        problem: the problem to encode.
        path: path of the file.
        encoding: name of the encoding, same as in `formulations.to_bqm`.
        prices: prices of the budgets, same as in `formulations.to_bqm`; the budgets are then not enforced.
        proven: enforce the budgets so that the least energy belongs to the best choice (see the module's docstring).

    Raises:
        EncodingError: see `formulations.to_bqm`.
    """
    encoded, bits = in_bits(problem, encoding, prices, proven=proven)
    encoded.bqm.scale(bits.scale)
    with encoded.bqm.to_file() as model, replacing(path) as file:
        file.write(with_entry(model.read(), bits))


def write_qubo(
    problem: Problem,
    path: AnyPath,
    *,
    encoding: str = ENCODING,
    prices: Prices | None = None,
    proven: bool = False,
) -> None:
    r"""Write the QUBO as coordinate text (see the module's docstring), atomically; arguments as in `write_bqm`.

    Raises:
        EncodingError: see `formulations.to_bqm`.

    >>> import pathlib, tempfile
    >>> problem = Problem(["a", "b"], [["keep", "prune"]] * 2, [0, 3, 0, 1], {}, {}, None, 0.5)
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.qubo"
    >>> write_qubo(problem, file)
    >>> print("\n".join(line for line in file.read_text().splitlines() if not line.startswith("c decode")))
    c 2 groups, 4 options as bits: encoding domain-wall, prices {}
    c offset 0.125
    c scale 0.25: objective = (sum of biases + offset) / scale; formulations.decode_bits makes choices of samples
    p qubo 0 2 2 0
    0 0 0.75
    1 1 0.25
    """
    encoded, bits = in_bits(problem, encoding, prices, proven=proven)
    bqm = encoded.bqm
    bqm.scale(bits.scale)
    linear, (rows, columns, values), offset = bqm.to_numpy_vectors(variable_order=range(bqm.num_variables))
    about = f"{problem.num_groups} groups, {problem.num_options} options as bits: encoding {encoding}"
    use = "objective = (sum of biases + offset) / scale; formulations.decode_bits makes choices of samples"
    with replacing(path) as file:
        file.write(f"c {about}, prices {bits.prices}\nc offset {float(offset)!r}\n".encode())
        file.write(f"c scale {bits.scale!r}: {use}\n{COMMENT}{json.dumps(bits.to_json())}\n".encode())
        file.write(f"p qubo 0 {len(linear)} {len(linear)} {len(values)}\n".encode())
        file.writelines(f"{i} {i} {bias!r}\n".encode() for i, bias in enumerate(linear.tolist()))
        first, second = np.minimum(rows, columns).tolist(), np.maximum(rows, columns).tolist()
        couplers = zip(first, second, values.tolist(), strict=True)
        file.writelines(f"{i} {j} {bias!r}\n".encode() for i, j, bias in couplers)
