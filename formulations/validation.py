"""Validate the arguments of `Problem`: each check returns the value to store, or raises InvalidProblemError."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms


def checked_names(values: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the names as a tuple of strings; a single string is refused."""
    if isinstance(values, str):  # its letters would be taken as names
        raise InvalidProblemError(f"{what} must be a sequence of names, found the string {values!r}")
    return tuple(str(value) for value in values)


def require_distinct(groups: tuple[str, ...], options: tuple[tuple[str, ...], ...], num_listed: int) -> None:
    """Require at least one group, at least one option per group, and distinct names."""
    if not groups:
        raise InvalidProblemError("a problem needs at least one group, found none")
    if num_listed != len(groups):
        raise InvalidProblemError(
            f"options must list one sequence per group: {len(groups)} groups, {num_listed} sequences"
        )
    if len(set(groups)) != len(groups):
        twice = Counter(groups).most_common(1)[0][0]
        raise InvalidProblemError(f"group names must differ, found {twice!r} twice")
    for name, labels in zip(groups, options, strict=True):
        if not labels:
            raise InvalidProblemError(f"group {name!r} has no option; give it at least one")
        if len(set(labels)) != len(labels):
            twice = Counter(labels).most_common(1)[0][0]
            raise InvalidProblemError(f"option names must differ within a group, found {twice!r} twice in {name!r}")


def checked_vector(values: ArrayLike, size: int, what: str) -> NDArray[np.float64]:
    """Return a read-only copy of ``values`` as ``(size,)`` finite numbers; ``what`` names them in errors."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidProblemError(f"{what} must be numbers: {error}") from error
    if array.shape != (size,):
        raise InvalidProblemError(f"{what} must have shape ({size},), one number per option; found {array.shape}")
    if not np.isfinite(array).all():
        option = int(np.argmin(np.isfinite(array)))
        raise InvalidProblemError(f"{what} must be finite, found {array[option]} at flat option {option}")
    return frozen(array)


def checked_uses(
    resources: Mapping[str, ArrayLike],
    groups: tuple[str, ...],
    options: tuple[tuple[str, ...], ...],
    group_offsets: NDArray[np.int64],
) -> dict[str, NDArray[np.float64]]:
    """Return the use of every resource by each option ``(V,)``; no use may be negative."""
    uses = {
        str(name): checked_vector(use, int(group_offsets[-1]), f"resource {name!r}") for name, use in resources.items()
    }
    for name, use in uses.items():
        if (use < 0).any():
            worst = int(np.argmin(use))
            group = int(np.searchsorted(group_offsets, worst, side="right")) - 1
            raise InvalidProblemError(
                f"resource {name!r} must not be negative, found {use[worst]:g} for option "
                f"{options[group][worst - group_offsets[group]]!r} of group {groups[group]!r}"
            )
    return uses


def checked_number(value: float, what: str) -> float:
    """Return ``value`` as a finite float; ``what`` names it in errors."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise InvalidProblemError(f"{what} must be a finite number, found {value!r}")
    return number


def checked_budgets(budgets: Mapping[str, float], resources: Mapping[str, Any]) -> dict[str, float]:
    """Return the budgets as finite numbers; each must name a resource of the problem."""
    _require_resources(budgets, resources, "budget")
    return {str(name): checked_number(budget, f"budget {name!r}") for name, budget in budgets.items()}


def checked_fixed(fixed: Mapping[str, float], resources: Mapping[str, Any]) -> dict[str, float]:
    """Return the fixed uses that are not 0; each must name a resource of the problem."""
    _require_resources(fixed, resources, "fixed use")
    uses = {str(name): checked_number(use, f"fixed use of {name!r}") for name, use in fixed.items()}
    for name, use in uses.items():
        if use < 0:
            raise InvalidProblemError(f"fixed use of {name!r} must not be negative, found {use:g}")
    return {name: use for name, use in uses.items() if use}


def _require_resources(names: Iterable[str], resources: Mapping[str, Any], what: str) -> None:
    for name in names:
        if name not in resources:
            known = ", ".join(sorted(resources)) or "none"
            raise InvalidProblemError(f"{what} {name!r} names no resource of the problem; it has: {known}")


def checked_pairs(pairs: PairTerms | None, group_of: NDArray[np.int64]) -> PairTerms:
    """Return the pair terms (empty for None); they must match the options and join only different groups."""
    if pairs is None:
        return PairTerms()
    if not isinstance(pairs, PairTerms):
        raise InvalidProblemError(f"pairs must be a PairTerms, found {type(pairs).__name__}")
    if pairs.num_options not in (None, len(group_of)):
        raise InvalidProblemError(f"pair terms are for {pairs.num_options} options, the problem has {len(group_of)}")
    if pairs.sparse is not None:
        rows = np.repeat(np.arange(len(group_of)), np.diff(pairs.sparse.indptr))
        inside = group_of[rows] == group_of[pairs.sparse.indices]
        if inside.any():
            first, second = rows[inside][0], pairs.sparse.indices[inside][0]
            raise InvalidProblemError(
                f"a pair term joins two options of one group (flat options {first} and {second}); "
                "only one option of a group is ever chosen, so remove the term"
            )
    return pairs


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Make the array read-only and return it."""
    array.flags.writeable = False
    return array
