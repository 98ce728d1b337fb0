"""What digests tell apart, kind by kind: one line a case, with what differs in braces."""

import copy
import functools
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompress.digests.libraries import is_library
from qcompress.identity import identify
from tests.digests.test_identity import digest
from tests.models import Residual, seeded

GIVEN = """
import collections, enum, functools, importlib, sys, types, typing
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
helpers = types.ModuleType("some_helpers")
class Net(nn.Module):
    def __init__(self, **held):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)
        self.register_buffer("row", torch.ones(1))
        for name, value in held.items():
            setattr(self, name, value)
    def forward(self, x): return self.layer(x)
def texted(source, **namespace):
    exec(source, namespace)
    return namespace["act"]
"""


def made(source: str, part: str = "") -> Any:
    """What a user's module calls ``run``, with a text in place of the braces."""
    module = types.ModuleType("a_users_module")
    exec(GIVEN + source.replace("{}", part), vars(module))  # noqa: S102 - the only way to have two values of one name
    return vars(module)["run"]


VALUES = {
    "list and tuple": ("[0, 1]", "(0, 1)"),
    "list and tuple in data": ("[[torch.ones(1)]]", "[(torch.ones(1),)]"),
    "counter and dict": ("collections.Counter(a=1)", "dict(a=1)"),
    "ordered and dict": ("collections.OrderedDict(a=1)", "dict(a=1)"),
    "order of an ordered dict": (
        "collections.OrderedDict(a=1, b=2)",
        "[d := collections.OrderedDict(a=1, b=2), d.move_to_end('a')][0]",
    ),
    "factory": ("collections.defaultdict(int)", "collections.defaultdict(float)"),
    "set and frozen set": ("{1}", "frozenset({1})"),
    "order of fields": ("collections.namedtuple('P', 'a b')(1, 2)", "collections.namedtuple('P', 'b a')(1, 2)"),
    "number of numpy": ("np.float64(0.1)", "0.1"),
    "width of a number": ("np.int32(3)", "np.int64(3)"),
    "numpy and torch": ("np.ones(1)", "torch.ones(1, dtype=torch.float64)"),
    "parameter and tensor": ("torch.ones(1)", "nn.Parameter(torch.ones(1))"),
    "kind of array": ("np.ones(1).view(np.recarray)", "np.ones(1)"),
    "unit of a time": ("np.timedelta64(5, 'Y')", "np.timedelta64(5, 'M')"),
    "field of a record": (
        "np.array([(1,)], dtype=[('a', 'i4')])[0]",
        "np.array([(1,)], dtype=[('b', 'i4')])[0]",
    ),
    "field of records with objects": (
        "np.array([(1,)], dtype=[('a', object)])",
        "np.array([(1,)], dtype=[('b', object)])",
    ),
    "object in a record": (
        "np.array([([2],)], dtype=[('a', object)])[0]",
        "np.array([([3],)], dtype=[('a', object)])[0]",
    ),
    "mask": ("np.ma.array([1.0, 2.0], mask=[0, 1])", "np.ma.array([1.0, 2.0], mask=[1, 0])"),
    "mask's filling": ("np.ma.array([1.0], fill_value=1.0)", "np.ma.array([1.0], fill_value=2.0)"),
    "text": ("texted('def act(x): return 2 * x')", "texted('def act(x): return 3 * x')"),
    "lambda's text": ("eval('lambda x: 2 * x', {})", "eval('lambda x: 3 * x', {})"),
    "class's text": ("texted('class act: SCALE = 2')", "texted('class act: SCALE = 3')"),
    "method in a text": (
        "texted('class act:\\n def run(x): return 2')",
        "texted('class act:\\n def run(x): return 3')",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_of_other_kinds_differ(case: str) -> None:
    first, second = VALUES[case]
    assert digest(made("run = {}", first)) == digest(made("run = {}", first)) != digest(made("run = {}", second))


SOURCES = {
    "wrapped": ("@functools.wraps(F.relu)\ndef run(x): return F.relu(x) * {}", "2", "3"),
    "method of a mapping": ("class D(dict):\n def __getitem__(self, k): return {}\nrun = D(a=1)", "2", "3"),
    "method of a user's mapping": ("class D(collections.UserDict):\n def get(self): return {}\nrun = D()", "2", "3"),
    "abstract mapping": (
        "class D(collections.abc.Mapping):\n def __getitem__(self, k): return {}\n"
        " def __iter__(self): return iter(())\n def __len__(self): return 1\nrun = D()",
        "2",
        "3",
    ),
    "method of a list": ("class D(list):\n def act(self, x): return {}\nrun = D([1])", "2", "3"),
    "method of a set": ("class D(set):\n def act(self, x): return {}\nrun = D({1})", "2", "3"),
    "method of a text": ("class D(str):\n def act(self, x): return {}\nrun = D('a')", "2", "3"),
    "method of a number": ("class D(float):\n def act(self, x): return {}\nrun = D(1)", "2", "3"),
    "method of a tuple": ("class D(typing.NamedTuple):\n a: int\n def act(self): return {}\nrun = D(1)", "2", "3"),
    "method of an array": ("class D(np.ndarray):\n def act(self): return {}\nrun = np.ones(1).view(D)", "2", "3"),
    "method of a tensor": (
        "class D(torch.Tensor):\n def act(self): return {}\nrun = torch.ones(1).as_subclass(D)",
        "2",
        "3",
    ),
    "method of a parameter": (
        "class D(nn.Parameter):\n def act(s): return {}\nrun = Net(w=D(torch.ones(1)))",
        "2",
        "3",
    ),
    "attribute of a mapping": ("class D(dict): pass\nrun = D(a=1)\nrun.scale = {}", "2", "3"),
    "attribute of a number": ("class D(int): pass\nrun = D(1)\nrun.scale = {}", "2", "3"),
    "slot of a list": ("class D(list): __slots__ = 'scale'\nrun = D([1])\nrun.scale = {}", "2", "3"),
    "view": ("w = nn.Parameter(1j * torch.ones(1))\nrun = Net(w=w, v=w.detach(){})", "", ".conj()"),
    "attribute of a tensor": ("run = torch.ones(1)\nrun.scale = {}", "2", "3"),
    "attribute of a parameter": ("run = Net()\nrun.layer.weight.scale = {}", "2", "3"),
    "attribute of a buffer": ("run = Net()\nrun.row.scale = {}", "2", "3"),
    "value of a member": ("class Mode(enum.Enum): FAST = {}\nrun = Mode.FAST", "2", "3"),
    "value of a flag": ("class Mode(enum.IntFlag): FAST = {}; SLOW = 8\nrun = Mode.FAST | Mode.SLOW", "2", "4"),
    "method of a member": ("class Mode(enum.Enum):\n FAST = 1\n def act(self): return {}\nrun = Mode.FAST", "2", "3"),
    "member in a set": ("class Mode(enum.Enum): FAST = {}; SLOW = 8\nrun = {Mode.FAST, Mode.SLOW}", "2", "3"),
    "all arguments": ("def run({}xs): return xs", "*", ""),
    "only by name": ("def run(a, {}b): return a", "*, ", ""),
    "only by place": ("def run(a, {}b): return a", "/, ", ""),
    "kind of function": ("{}def run(x): return None", "async ", ""),
    "where errors are caught": (
        "def run(x):\n try:\n  a = x.b\n{}",
        "  c = a()\n except E: return 1",
        " except E: return 1\n c = a()",
    ),
    "kind of method": ("class run:\n @{}\n def act(*a): return len(a)", "staticmethod", "classmethod"),
    "method or not": ("class run:\n {}\n def act(*a): return len(a)", "@staticmethod", ""),
    "call by a partial": ("class run: __call__ = functools.partial(max, {})", "2", "3"),
    "attribute like a library's": ("def act(m): return m._hf_scale\nrun = (act, Net(_hf_scale={}))", "2", "3"),
    "held module": ("helpers.SCALE = {}\nrun = Net(ops=helpers)", "2", "3"),
    "function of a held module": ("exec('def act(x): return {}', vars(helpers))\nrun = Net(ops=helpers)", "2", "3"),
    "module as a default": ("helpers.SCALE = {}\ndef run(x, h=helpers): return h.SCALE", "2", "3"),
    "module in a closure": (
        "helpers.SCALE = {}\ndef outer(h):\n return lambda x: x * h.SCALE\nrun = outer(helpers)",
        "2",
        "3",
    ),
    "module asked by a text": ("helpers.SCALE = {}\ndef run(x, name): return getattr(helpers, name)", "2", "3"),
    "module asked for its namespace": (
        "helpers.SCALE = {}\ndef run(x, name): return x * helpers.__dict__[name]",
        "2",
        "3",
    ),
    "module imported and asked": (
        "sys.modules['some_helpers'] = helpers\nhelpers.SCALE = {}\n"
        "def run(x, name):\n import some_helpers as h\n return getattr(h, name)",
        "2",
        "3",
    ),
    "module in a module asked": (
        "helpers.ops = types.ModuleType('some_helpers.ops')\nhelpers.ops.SCALE = {}\n"
        "def run(x, name): return getattr(helpers.ops, name)",
        "2",
        "3",
    ),
    "module in a module": (
        "helpers.ops = types.ModuleType('some_helpers.ops')\nhelpers.ops.SCALE = {}\n"
        "def run(x): return helpers.ops.SCALE",
        "2",
        "3",
    ),
    "package of an imported module": (
        "helpers.ops = types.ModuleType('some_helpers.ops')\nhelpers.SCALE = {}\n"
        "sys.modules |= {'some_helpers': helpers, 'some_helpers.ops': helpers.ops}\n"
        "def run(x):\n import some_helpers.ops\n return some_helpers.SCALE",
        "2",
        "3",
    ),
    "attribute of one of two tensors": (
        "a, b = torch.ones(1), torch.ones(1)\na.scale, b.scale = 2, 3\nrun = [a, b, {}]",
        "a",
        "b",
    ),
    "attribute of a member": (
        "class Mode(enum.Enum): FAST = 1\nMode.FAST.scale = {}\ndef run(x): return Mode.FAST.scale",
        "2",
        "3",
    ),
    "cached method of a member": (
        "class Mode(enum.Enum):\n FAST = 1\n @functools.cache\n def act(self): return {}\nrun = Mode.FAST",
        "2",
        "3",
    ),
    "list in an enumeration": ("class Mode(enum.Enum): FAST = 1\nMode.kept = [{}]\nrun = Mode.FAST", "2", "3"),
    "property of a member": (
        "class Mode(enum.Enum):\n FAST = 1\n @enum.property\n def act(self): return {}\nrun = Mode.FAST",
        "2",
        "3",
    ),
    "class made by a function": ("run = types.new_class('D', (), None, lambda n: n.update(SCALE={}))", "2", "3"),
    "class of a wrapped function": (
        "@functools.wraps(F.relu)\ndef act(x): return {}\n"
        "run = types.new_class('D', (), None, lambda n: n.update(act=act))",
        "2",
        "3",
    ),
    "slot of a settings class": (
        "import dataclasses\n@dataclasses.dataclass(slots=True)\nclass D: scale: int\nrun = Net(s=D({}))",
        "2",
        "3",
    ),
    "module passed on": ("helpers.SCALE = {}\ndef act(h): return h.SCALE\ndef run(x): return act(helpers)", "2", "3"),
    "hook with keywords": ("run = Net()\nrun.register_forward_hook(print, with_kwargs={})", "True", "False"),
    "hook in any case": ("run = Net()\nrun.register_forward_hook(print, always_call={})", "True", "False"),
    "hook before with keywords": ("run = Net()\nrun.register_forward_pre_hook(print, with_kwargs={})", "True", "False"),
    "order of hooks": (
        "run = Net()\nrun.register_forward_hook(print)\nrun.register_forward_hook(max, prepend={})",
        "True",
        "False",
    ),
    "backward hook": ("run = Net()\nrun.register_full_backward_hook(lambda m, i, o: {})", "2", "3"),
    "backward hook before": ("run = Net()\nrun.register_full_backward_pre_hook(lambda m, o: {})", "2", "3"),
    "weight's hook": ("run = Net()\nrun.layer.weight.register_hook(lambda g: g * {})", "2", "3"),
    "weight's last hook": ("run = Net()\nrun.layer.weight.register_post_accumulate_grad_hook(lambda g: {})", "2", "3"),
    "buffer in files": ("run = Net()\nrun.register_buffer('kept', torch.ones(1), persistent={})", "True", "False"),
    "dispatched function": (
        "@functools.singledispatch\ndef run(x): return x\n@run.register\ndef _(x: int): return {}",
        "2",
        "3",
    ),
    "custom function": (
        "class STE(torch.autograd.Function):\n @staticmethod\n def forward(c, x): return x * {}\n"
        " @staticmethod\n def backward(c, g): return g\ndef run(x): return STE.apply(x)",
        "2",
        "3",
    ),
    "contents that a pass reads": (
        "class Cfg:\n def __init__(self, **k): self._data = k\n def __getitem__(self, k): return self._data[k]\n"
        " def __setitem__(self, k, v): self._data[k] = v\n def __enter__(self): self._data.clear()\n"
        "class Own(Net):\n def forward(self, x): return x * self.cfg['scale']\nrun = Own(cfg=Cfg(scale={}))",
        "2",
        "3",
    ),
    "function of a graph": (
        "def act(x): return x * {}\n"
        "graph = torch.fx.Graph()\ngraph.output(graph.call_function(act, (graph.placeholder('x'),)))\n"
        "run = torch.fx.GraphModule(nn.Module(), graph)",
        "2",
        "3",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_what_users_write_counts(case: str) -> None:
    source, first, second = SOURCES[case]
    assert digest(made(source, first)) == digest(made(source, first)) != digest(made(source, second))


NAMED = {
    "globals": "def run(x): return globals()[x]",
    "eval": "def run(x): return eval(x)",
    "exec": "def run(x): exec(x)",
    "__import__": "def run(x): return __import__(x).SCALE",
    "import_module by name": "from importlib import import_module\ndef run(x): return import_module(x).SCALE",
    "import_module as other": "from importlib import import_module as get\ndef run(x): return get(x).SCALE",
    "import_module within": "def run(x):\n from importlib import import_module as get\n return get(x).SCALE",
    "sys.modules by name": "def run(x):\n from sys import modules\n return modules[x].SCALE",
    "open": "def run(x): return open(x).read()",
    "import_module": "def run(x): return importlib.import_module(x).SCALE",
    "sys.modules": "def run(x): return sys.modules[x].SCALE",
}


@pytest.mark.parametrize("case", NAMED)
def test_what_is_looked_up_by_a_text_is_named(case: str) -> None:
    named = f"forward.{case.partition(' ')[0]}: what it finds when it runs"
    assert identify(made(NAMED[case]), "forward").unchecked == (named,)


ORDINARY = (
    "def run(x, eval=False): return eval and x.eval",
    "def run(net): return sys.path, net.modules()",
    "def run(net): return net.eval().exec, list(net.modules()), net.globals",
    "def eval(x): return x\ndef run(x): return eval(x), getattr(x, 'a')",
    "def run(x): return getattr(sys, x), sys.path, importlib.metadata",
)


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_code_is_not_named(source: str) -> None:
    assert digest(made(source)) == digest(made(source))


def test_a_function_made_of_a_users_by_numpy_is_named() -> None:
    assert identify(made("run = np.frompyfunc(lambda x: x, 1, 1)"), "act").unchecked == ("act: ufunc",)
    assert digest(made("run = np.sin")) != digest(made("run = np.cos"))


DISPATCHING = """
@functools.singledispatch
def act(x): return x
class Own(Net):
    @functools.singledispatchmethod
    def act(self, x): return x
    def forward(self, x): return self.act(act(self.layer(x)))
run = Own()
"""


@pytest.mark.parametrize("source", [DISPATCHING, "run = torch.fx.symbolic_trace(Net())"])
def test_what_libraries_keep_of_a_pass_or_a_copy_does_not_count(source: str) -> None:
    model = made(source)
    before = digest(model)
    model(torch.ones(1, 1))
    assert digest(model) == before == digest(copy.deepcopy(model)) == digest(made(source))
    if isinstance(model, torch.fx.GraphModule):
        file = io.BytesIO()
        torch.save(model, file)
        assert digest(torch.load(io.BytesIO(file.getvalue()), weights_only=False)) == before


def all_digests() -> list[str]:
    return [digest(made(source, part)) for source, *parts in SOURCES.values() for part in parts]


@pytest.mark.slow
def test_another_process_tells_the_same_apart() -> None:
    code = "from tests.digests.test_kinds import all_digests; print(*all_digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == all_digests()


def test_a_function_belongs_to_the_place_of_its_code() -> None:
    def own(x: Tensor) -> Tensor:
        return x

    assert not is_library(functools.wraps(torch.relu)(own))
    assert is_library(torch.no_grad()(own))
    assert not is_library(made)
    assert is_library(types.SimpleNamespace)


def test_hooks_that_are_gone_do_not_count() -> None:
    model = seeded(Residual)
    before = digest(model)
    hook: Callable[..., None] = print
    model.register_full_backward_hook(hook).remove()
    next(model.parameters()).register_hook(hook).remove()
    assert digest(model) == before
