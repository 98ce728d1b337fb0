"""Specify solvers as text, for command lines and settings files.

    anneal                                              a name
    anneal:sweeps=200,restarts=3                        a name with options
    my_package.my_module:MySolver:tries=50              your own solver, by import path
    dwave.samplers:TabuSampler:timeout=100,rounds=4     a dimod sampler; unknown options become its parameters

An import path refers to a `Solver` or a dimod sampler: an instance, a class that needs no arguments, or a function
without arguments that returns one (for composites and anything that needs to be set up).
"""

import ast
import importlib
import re
from typing import Any

from solvers import registry
from solvers.base import Solver
from solvers.errors import InvalidOptionError, UnknownSolverError

WORDS = re.compile(r"(?P<name>[\w.-]+)(?::(?P<path>[A-Za-z_][\w.]*)(?=:|$))?(?::(?P<options>.*))?", re.DOTALL)
NEXT_OPTION = re.compile(r",(?=\s*[A-Za-z_]\w*\s*=)")
"""A comma that is followed by ``name=``; other commas belong to values such as ``beta_range=(0.1, 3)``."""


def resolved(words: str) -> tuple[Any, dict[str, Any]]:
    """Parse a solver's specification into its name (or the imported object) and its options.

    Raises:
        UnknownSolverError: there is no such module or object.
        InvalidOptionError: the syntax of ``words`` is wrong.

    >>> resolved("anneal:sweeps=200")
    ('anneal', {'sweeps': 200})
    """
    match = WORDS.fullmatch(words)
    if match is None:
        raise InvalidOptionError(
            f"write a solver as NAME:option=value,… or package.module:object:option=value,…, found {words!r}"
        )
    name, path = match["name"], match["path"]
    if path is not None and name in registry.names():
        raise InvalidOptionError(f"write the options of a solver as {name}:name=value,…, found {words!r}")
    return name if path is None else _imported(name, path), options_of(match["options"])


def options_of(text: str | None) -> dict[str, Any]:
    """Parse ``name=value,…`` into a dictionary; values are Python literals, or else strings.

    Raises:
        InvalidOptionError: the syntax is wrong, or a name is given twice.

    >>> options_of("beta_range=(0.1, 3), backend=cbc")
    {'beta_range': (0.1, 3), 'backend': 'cbc'}
    """
    options: dict[str, Any] = {}
    for word in [] if text is None else NEXT_OPTION.split(text):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not (name and equals and value) or name in options:
            raise InvalidOptionError(f"write options as name=value,name=value, each once; found {text!r}")
        options[name] = value_of(value)
    return options


def configured(solver: Solver, options: dict[str, Any]) -> Solver:
    """Return ``solver`` with options; unknown options become parameters of its dimod sampler, if it has one.

    Raises:
        InvalidOptionError: neither the solver nor the sampler has such an option.
    """
    known = solver.option_defaults()
    if "parameters" not in known:
        return registry.configured(solver, options)
    passed = {name: value for name, value in options.items() if name not in known}
    parameters = {**(getattr(solver, "parameters", None) or {}), **passed}
    kept = {name: value for name, value in options.items() if name in known}
    return registry.configured(solver, {**kept, "parameters": parameters} if passed else kept)


def _imported(module_name: str, path: str) -> Any:
    """Import the object at an import path; functions, and classes other than `Solver` classes, are called."""
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnknownSolverError(
            f"solver '{module_name}:{path}': no module is called {error.name!r}, and no solver {module_name!r}"
        ) from error
    for part in path.split("."):
        if not hasattr(value, part):
            public = ", ".join(name for name in vars(value) if not name.startswith("_")) or "nothing public"
            raise UnknownSolverError(f"solver '{module_name}:{path}': there is no {part!r}; there is {public}")
        value = getattr(value, part)
    if isinstance(value, type):
        return value if issubclass(value, Solver) else value()
    is_sampler = hasattr(value, "sample") or hasattr(value, "sample_cqm")
    return value() if callable(value) and not is_sampler else value


def value_of(text: str) -> Any:
    """Return the value of a Python literal (or ``true``, ``false``), and any other text unchanged.

    >>> value_of("1_000"), value_of("true"), value_of("cbc")
    (1000, True, 'cbc')
    """
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
