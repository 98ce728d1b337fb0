"""Estimate the submission of a problem: its size and the solver's limits, the minimum time, and the charge.

The limits, the minimum time and the rate of the quota are properties of the service's solver, so `estimate` needs them.
Without an answer of the service there is still the size, and the charge of a given time limit (`without_service`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from formulations.forms.precision import CoefficientReport
from solvers.leap.forms import RemoteForm


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimate of a submission before anything is sent.

    What only the service knows is None if it was not asked, or gave no answer; ``not_looked_up`` says why.

    Attributes:
        remote: name of the service's solver; if it was not asked, the name asked for, or an empty string.
        problem_type: problem type of the form, as the service calls it.
        sizes: name of a limited size → (size of the problem, limit of the solver or None if it publishes none).
        min_time_s, max_time_s: range of time limits that the solver accepts for this problem; None without a maximum.
        time_limit_s: time limit with which the problem would be sent.
        charge_s: solver time that is expected to be charged, in seconds.
        quota_s: use of the account's quota, in seconds of quantum processor time; None if the rate is not published.
        refusal: why the problem cannot be sent, or an empty string.
        coefficients: loss of the model at the precision of a quantum processor, before chains; None for hybrid solvers,
            which compute in double precision.
        not_looked_up: what was not looked up at the service, and why, or an empty string.
    """

    remote: str
    problem_type: str
    sizes: Mapping[str, tuple[int, int | None]]
    min_time_s: float | None
    max_time_s: float | None
    time_limit_s: float | None
    charge_s: float | None
    quota_s: float | None
    refusal: str
    coefficients: CoefficientReport | None = None
    not_looked_up: str = ""

    @property
    def numbers(self) -> int:
        """Number of values that make up the model: biases, or the doubles of the state."""
        sizes = {name: size for name, (size, _) in self.sizes.items()}
        return sizes.get("biases", sizes.get("state_bytes", 0) // 8)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as a dictionary that JSON can store."""
        return asdict(self)


def estimate(form: RemoteForm, remote: Any, time_limit: float | None) -> Estimate:
    """Estimate the submission of ``form`` to the service's hybrid solver ``remote``.

    Args:
        form: the problem in the solver's form.
        remote: a solver with ``name`` and ``properties``, as in ``dwave.cloud``.
        time_limit: time limit in seconds, or None for the minimum that the solver accepts.
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
        refusal=f"solver {remote.name!r} cannot solve this problem: " + "; ".join(why) if why else "",
    )


def without_service(
    problem_type: str,
    sizes: Mapping[str, int],
    *,
    remote: str = "",
    time_limit: float | None = None,
    coefficients: CoefficientReport | None = None,
) -> Estimate:
    """Estimate a submission by what is known without the service; a hybrid solver charges its time limit.

    >>> guess = without_service("cqm", {"variables": 4}, time_limit=10)
    >>> guess.sizes, guess.charge_s, guess.min_time_s
    ({'variables': (4, None)}, 10.0, None)
    """
    seconds = None if time_limit is None else float(time_limit)
    return Estimate(
        remote=remote,
        problem_type=problem_type,
        sizes={name: (size, None) for name, size in sizes.items()},
        min_time_s=None,
        max_time_s=None,
        time_limit_s=seconds,
        charge_s=seconds,
        quota_s=None,
        refusal="",
        coefficients=coefficients,
    )
