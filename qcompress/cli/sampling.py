"""Print the quality of samples at each step from raw samples to the answer, chain statistics and time spent."""

from collections.abc import Mapping, Sequence
from typing import Any

from formulations.formatting import number, percent
from qcompress.cli.console import print_lines, print_table
from solvers import Solution

STEPS = ("raw", "decoded", "repaired", "polished")
SHARES = ("valid", "feasible_raw", "feasible_decoded")
BARS = " ▁▂▃▄▅▆▇█"


def print_sampling(solution: Solution) -> None:
    """Print sampling statistics of a solution; nothing if its solver does not sample."""
    details = solution.details
    if "samples" in details:
        print_table(
            ("samples", ">best objective"), [(step, number(details.get(f"objective_{step}"), 9)) for step in STEPS]
        )
        shares = ", ".join(f"{name.replace('_', ' ')} {percent(details.get(f'share_{name}'))}" for name in SHARES)
        print_lines(f"{details['samples']} samples; {shares}")
    if "energy_histogram" in details:
        edges, counts = details["energy_histogram"]["edges"], details["energy_histogram"]["counts"]
        print_lines(
            f"energies {number(edges[0], 4)} |{bars(counts)}| {number(edges[-1], 4)}, at most {max(counts)} a bar"
        )
    if "qubits" in details:
        print_lines(_chains(details))
    if "time_to_solution_s" in details:
        print_lines(_time_to_solution(details["time_to_solution_s"], solution.timing))
    if "parts" in details:
        _print_parts(details)
    if "samples" in details or "parts" in details:
        print_lines(", ".join(f"{name.removesuffix('_s')} {spent:.3f} s" for name, spent in solution.timing.items()))


def bars(counts: Sequence[int]) -> str:
    """A histogram in one line; every non-empty bin is visible.

    >>> bars([0, 1, 50, 100])
    ' ▁▄█'
    """
    most = max(counts, default=0) or 1
    return "".join(BARS[max(1, count * (len(BARS) - 1) // most) if count else 0] for count in counts)


def _chains(details: Mapping[str, Any]) -> str:
    return (
        f"{details['variables']} variables on {details['qubits']} qubits, longest chain {details['longest_chain']}, "
        f"chain strength {number(details['chain_strength'], 4)}, chains broken {percent(details['chain_breaks'])}"
    )


def _time_to_solution(seconds: float | None, timing: Mapping[str, float]) -> str:
    apart = f"queue {timing.get('queue_s', 0.0):.3f} s and access {timing.get('qpu_s', 0.0):.3g} s apart"
    if seconds is None:
        return f"time to solution: no sample was within the budgets ({apart})"
    return (
        f"time to solution {seconds:.3g} s of sampling: to the best sample's objective, with 99 % probability ({apart})"
    )


def _print_parts(details: Mapping[str, Any]) -> None:
    rows = [
        (
            str(number + 1),
            str(part["groups"]),
            *(str(part.get(name, "–")) for name in ("variables", "qubits")),
            percent(part.get("chain_breaks")),
            percent(part.get("share_feasible_decoded")),
            "yes" if part["better"] else "no",
        )
        for number, part in enumerate(details["parts"])
    ]
    print_table((">part", ">groups", ">variables", ">qubits", ">chains broken", ">feasible", "better"), rows)
