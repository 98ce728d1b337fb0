"""Options of a quantum processor: their form, and whether a processor takes them. Imports none of D-Wave's packages."""

import collections
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from formulations.files import read_json
from solvers.errors import InvalidOptionError

Embedding = dict[int, list[int]]
"""Map from each variable to its chain of qubits."""

Schedule = tuple[tuple[float, float], ...]
"""Points of an anneal: time in microseconds, and anneal fraction from 0 to 1."""


def schedule_of(points: Any) -> Schedule:
    """Return the points of an anneal schedule, checked as far as this needs no processor.

    Raises:
        InvalidOptionError: the points are not a forward anneal: from (0, 0) to a fraction of 1, times rising, fractions
            not falling.

    >>> schedule_of([[0, 0], [10, 0.4], [30, 0.4], [40, 1]])
    ((0.0, 0.0), (10.0, 0.4), (30.0, 0.4), (40.0, 1.0))
    """
    try:
        schedule = tuple((float(t_us), float(fraction)) for t_us, fraction in points)
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(
            f"option 'anneal_schedule' must be pairs of a time in microseconds and a fraction, found {points!r}"
        ) from error
    steps = list(itertools.pairwise(schedule))
    begins = bool(steps) and schedule[0] == (0.0, 0.0) and schedule[-1][1] == 1.0 and math.isfinite(schedule[-1][0])
    if not begins or not all(t0 < t1 and s0 <= s1 for (t0, s0), (t1, s1) in steps):
        raise InvalidOptionError(
            "option 'anneal_schedule' must begin at (0, 0) and end at fraction 1, with times that rise and fractions "
            f"that do not fall (reverse annealing is not offered), found {points!r}"
        )
    return schedule


def embedding_of(embedding: Mapping[Any, Any] | str) -> Embedding:
    """Return an embedding, or the content of its JSON file, with whole numbers as variables and qubits.

    Raises:
        InvalidOptionError: it does not map whole numbers (or texts of them, as in JSON) to lists of whole numbers, two
            keys or two qubits of a chain are the same number, or the file cannot be read.
        FileFormatError: the file is damaged, or holds no JSON object.

    >>> embedding_of({"0": [3, 7], "1": (4,)})
    {0: [3, 7], 1: [4]}
    """
    if isinstance(embedding, str):
        try:
            embedding = read_json(embedding, "embedding")
        except OSError as error:
            raise InvalidOptionError(f"option 'embedding': {error}") from error
    try:
        variables = [int(v) if isinstance(v, str) else operator.index(v) for v in embedding]
        chains = [[operator.index(qubit) for qubit in chain] for chain in embedding.values()]
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(
            f"option 'embedding' must map each variable (0, 1, ...) to a list of qubits: {error}"
        ) from error
    if twice := [v for v, count in collections.Counter(variables).items() if count > 1]:
        raise InvalidOptionError(f"option 'embedding' must map each variable to one chain, found two for {twice[0]}")
    if twice := [v for v, chain in zip(variables, chains, strict=True) if len(set(chain)) < len(chain)]:
        raise InvalidOptionError(
            f"option 'embedding' must name each qubit of a chain once, found one twice for variable {twice[0]}"
        )
    return dict(zip(variables, chains, strict=True))


def reads_of(num_reads: int, gauges: int) -> list[int]:
    """Divide the reads among the gauges.

    >>> reads_of(100, 3)
    [34, 33, 33]
    """
    return [num_reads // gauges + (k < num_reads % gauges) for k in range(gauges)]


def refusals(submissions: Sequence[Mapping[str, Any]], properties: Mapping[str, Any]) -> list[str]:
    """Say why a processor with these properties does not take the parameters of submissions, with what it takes."""
    why = []
    least, most = properties.get("num_reads_range", (1, math.inf))
    if wrong := [reads for one in submissions if not least <= (reads := one["num_reads"]) <= most]:
        why.append(f"num_reads={wrong[0]}, it takes {least} to {most}")
    shortest, longest = properties.get("annealing_time_range", (0.0, math.inf))
    time_us, schedule = submissions[0].get("annealing_time"), submissions[0].get("anneal_schedule", ())
    if time_us is not None and not shortest <= time_us <= longest:
        why.append(f"annealing_time_us={time_us:g}, it takes {shortest:g} to {longest:g}")
    if len(schedule) > (points := properties.get("max_anneal_schedule_points", math.inf)):
        why.append(f"an anneal schedule of {len(schedule)} points, it takes at most {points}")
    if schedule and schedule[-1][0] > longest:
        why.append(f"an anneal schedule of {schedule[-1][0]:g} microseconds, it takes at most {longest:g}")
    if any((s1 - s0) * shortest > (t1 - t0) * (1 + 1e-9) for (t0, s0), (t1, s1) in itertools.pairwise(schedule)):
        why.append(f"an anneal schedule steeper than 1/{shortest:g} per microsecond")
    _, longest_run = properties.get("problem_run_duration_range", (0.0, math.inf))
    if (run_us := max(run_duration_us(one, properties) for one in submissions)) > longest_run:
        why.append(
            f"a submission that runs for {run_us:g} microseconds, it takes at most {longest_run:g}: use fewer reads, "
            "shorter anneals or more gauges, which divide the reads"
        )
    return why


def run_duration_us(submission: Mapping[str, Any], properties: Mapping[str, Any]) -> float:
    """Duration of a submission as a processor limits it: reads and programming, with the processor's default waits.

    >>> run_duration_us({"num_reads": 100, "annealing_time": 20.0}, {"default_programming_thermalization": 1000.0})
    3000.0
    """
    schedule = submission.get("anneal_schedule")
    default_us = schedule[-1][0] if schedule else properties.get("default_annealing_time", 0.0)
    read_us = submission.get("annealing_time", default_us) + properties.get("default_readout_thermalization", 0.0)
    return float(submission["num_reads"] * read_us + properties.get("default_programming_thermalization", 0.0))
