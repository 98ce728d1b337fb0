"""Encodings of "one option per group" in bits, one per module, each with the proof of its penalties.

An encoding takes the objective as a `Quadratic` in x, with one variable per option. It returns the objective as a
`Quadratic` in its bits, with penalties that make every ground state valid, and the `Code` that maps bits to options.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from formulations.forms.couplings import Couplings, Floats
from formulations.forms.encodings import binary, domain_wall, one_hot
from formulations.forms.encodings.code import Code
from formulations.forms.quadratic import Quadratic
from formulations.problem import Problem

__all__ = ["ENCODINGS", "Code", "Encoding"]

Encoding = Callable[[Quadratic, Problem, Floats, Couplings, float | Floats, float], tuple[Quadratic, Code, Floats]]
"""``(form, problem, cost, pairs, strength, worth) -> (form in bits, code, penalty (G,))``; see `one_hot.encode`."""

ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {"one-hot": one_hot.encode, "domain-wall": domain_wall.encode, "binary": binary.encode}
)
