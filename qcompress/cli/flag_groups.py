"""Groups of flags: dataclasses whose fields are flags, so that several commands share them and their checks.

    @dataclass(frozen=True, kw_only=True)
    class SolverFlags:
        solver: arguments.SolverName = "auto"
        seed: arguments.Seed = 0

    @with_flag_groups
    def solve(problem: arguments.ProblemFile, flags: SolverFlags) -> None: ...

typer sees ``solve PROBLEM --solver … --seed …``; the function receives the dataclass.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def with_flag_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``command`` for typer: every parameter that is a dataclass is replaced by that dataclass's fields."""
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints[name])}

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        values = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return command(**values, **given)

    parameters = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as keyword parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
