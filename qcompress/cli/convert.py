"""``convert``: write a problem for other tools, or read it back."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import say


def convert(
    source: Annotated[Path, typer.Argument(metavar="PROBLEM", help="A problem file, or a file written by convert.")],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="File to write; its suffix sets the format: .lp .mps .cqm .bqm .qubo or .npz."
        ),
    ],
    encoding: Annotated[
        str | None,
        typer.Option(help="Encoding of the bits in .bqm and .qubo: domain-wall (default), one-hot or binary."),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PRICE",
            help="In .bqm and .qubo: objective per unit of a budget's resource, instead of slack bits.",
        ),
    ] = None,
    proven: Annotated[
        bool,
        typer.Option(
            help="In .bqm and .qubo: penalties so large that the least energy is the best choice. Annealers do better "
            "without."
        ),
    ] = False,
) -> None:
    """Write a problem for other tools: integer program, CQM, BQM or QUBO text.

    .lp, .mps and .cqm files can be converted back to the same problem. .bqm and .qubo files no longer state groups and
    budgets; they are converted to a problem whose variables are the bits.

    Example: `qcompress convert problem.npz problem.mps`
    """
    from formulations.exchange.suffixes import read_problem, write_problem

    problem = read_problem(source)
    prices = arguments.amounts(price, "--price") if price else None
    write_problem(problem, target, encoding=encoding, prices=prices, proven=proven)
    say(f"wrote {target} ({target.stat().st_size:,} bytes)")
