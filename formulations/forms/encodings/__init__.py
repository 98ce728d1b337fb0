"""How "one option per group" is written in bits; one encoding a file, each with the proof of its penalties.

An encoding takes the objective as a `Quadratic` in x, one variable per option, and gives it as one in its bits, with
the penalties that make every ground state valid, and the `Code` that leads back.
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
