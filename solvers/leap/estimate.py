"""Estimate what sending a problem would take: its size against the solver's limits, the least time, the charge."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from formulations.forms.precision import CoefficientReport
from solvers.leap.forms import RemoteForm


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is known before anything is sent.

    Attributes:
        remote: name of the service's solver.
        problem_type: of the form.
        sizes: what is limited → (the problem's, the solver's limit or None where it publishes none).
        min_time_s, max_time_s: time limits that the solver takes for this problem; no maximum known: None.
        time_limit_s: the time it would be sent with.
        charge_s: solver time that is expected to be charged.
        quota_s: what that takes of the account's quota, in seconds of quantum processor time; None if not published.
        refusal: why it cannot be sent, or an empty string.
        coefficients: what the precision of a quantum processor would lose of the model, before chains; hybrid
            solvers compute in double precision: None.
    """

    remote: str
    problem_type: str
    sizes: Mapping[str, tuple[int, int | None]]
    min_time_s: float
    max_time_s: float | None
    time_limit_s: float
    charge_s: float
    quota_s: float | None
    refusal: str
    coefficients: CoefficientReport | None = None

    @property
    def numbers(self) -> int:
        """Numbers that make up the model: biases, or the doubles of the state."""
        sizes = {name: size for name, (size, _) in self.sizes.items()}
        return sizes.get("biases", sizes.get("state_bytes", 0) // 8)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return asdict(self)


def estimate(form: RemoteForm, remote: Any, time_limit: float | None) -> Estimate:
    """Estimate what sending ``form`` to the service's hybrid solver ``remote`` would take.

    Args:
        form: the problem in the solver's form.
        remote: has ``name`` and ``properties``, as ``dwave.cloud`` solvers do.
        time_limit: seconds, or None for the least that the solver takes.
    """
    properties = remote.properties
    sizes = {name: (size, properties.get(form.limits[name])) for name, size in form.sizes().items()}
    least, hours = form.min_time_s(properties), properties.get("maximum_time_limit_hrs")
    most = None if hours is None else 3600.0 * hours
    seconds = least if time_limit is None else float(time_limit)
    why = [f"{size:,} {name}, it takes {limit:,}" for name, (size, limit) in sizes.items() if limit and size > limit]
    if seconds < least:
        why.append(f"a time limit of {seconds:g} s, it needs at least {least:.3g} s for this problem")
    if most is not None and seconds > most:
        why.append(f"a time limit of {seconds:g} s, it takes at most {most:g} s")
    rate = properties.get("quota_conversion_rate")
    return Estimate(
        remote=remote.name,
        problem_type=form.problem_type,
        sizes=sizes,
        min_time_s=least,
        max_time_s=most,
        time_limit_s=seconds,
        charge_s=seconds,
        quota_s=seconds / rate if rate else None,
        refusal=f"solver {remote.name!r} cannot take it: " + "; ".join(why) if why else "",
    )
