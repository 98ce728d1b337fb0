"""What digests leave out, what they name, and that they do not run what they read: one line a case."""

import pytest
import torch

from qcompress.identity import identify
from tests.test_digest_kinds import made
from tests.test_identity import digest

PASSES = {
    "held module": "helpers.calls = 0\nclass Own(Net):\n def forward(self, x):\n  self.ops.calls += 1\n  return x\n"
    "run = Own(ops=helpers)",
    "module": "helpers.calls = 0\nclass Own(Net):\n def forward(self, x):\n  helpers.calls += 1\n  return x\n"
    "run = Own()",
    "function's module": "helpers.calls = 0\ndef run(x): helpers.calls += 1",
    "a user's mapping": "class D(collections.UserDict):\n reads = 0\n"
    " def __getitem__(self, key):\n  self.reads += 1\n  return self.data[key]\n"
    "class Own(Net):\n def forward(self, x): return x * self.kept['a']\nrun = Own(kept=D(a=1))",
    "items of a user's class": "class D:\n def __init__(self): self.data = {0: 1}\n"
    " def __setitem__(self, key, value): self.data[key] = value\n"
    "class Own(Net):\n def forward(self, x):\n  kept = self.kept\n  kept[len(kept.data)] = 1\n  return x\n"
    "run = Own(kept=D())",
    "sum of a user's class": "class D:\n data = 0\n def __iadd__(self, more):\n  self.data += more\n  return self\n"
    "class Own(Net):\n def forward(self, x):\n  kept = self.kept\n  kept += 1\n  return x\nrun = Own(kept=D())",
    "entering a user's class": "class D:\n data = 0\n def __enter__(self): self.data += 1\n"
    " def __exit__(self, *error): pass\n"
    "class Own(Net):\n def forward(self, x):\n  with self.kept: return x\nrun = Own(kept=D())",
}
"""Code that counts its passes, where counts are named."""


@pytest.mark.parametrize("case", PASSES)
def test_counts_of_passes_are_named(case: str) -> None:
    run = made(PASSES[case])
    before = identify(run)
    run(torch.ones(1, 1))
    first = identify(run)
    run(torch.ones(1, 1))
    assert first.digest == identify(run).digest
    assert before.digest == first.digest
    assert len(first.unchecked) == 1


SAME = {
    "lock in a module passed through": (
        "import threading\nhelpers.ops = types.ModuleType('some_helpers.ops')\nhelpers.ops.act = max\n{}\n"
        "def run(x): return helpers.ops.act(x)",
        "",
        "helpers.ops._lock = threading.Lock()",
    ),
    "folder in an imported module": (
        "helpers.ops = types.ModuleType('some_helpers.ops')\nhelpers.ops.act, helpers.ops.ROOT = max, '{}'\n"
        "sys.modules['some_helpers'] = helpers\ndef run(x):\n from some_helpers import ops\n return ops.act(x)",
        "here",
        "there",
    ),
    "numbers of torch": ("@torch.compiler.disable\ndef run(x): return x\nother = {}", "2", "3"),
    "dispatching by an abstract class": (
        "@functools.singledispatch\ndef run(x): return x\n@run.register\ndef _(x: collections.abc.Sized): return 1\n{}",
        "",
        "collections.abc.Sized.register(type('D', (), {})); run.dispatch(int)",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_outputs_do_not_depend_on_does_not_count(case: str) -> None:
    source, first, second = SAME[case]
    kept = made(source, first)
    assert digest(kept) == digest(made(source, second))


STRANGE = {
    "keys as attributes": "class D(dict): __slots__ = (); __getattr__ = dict.__getitem__\nrun = D(a=1)",
    "its own attributes": "class D(dict): pass\nrun = D({0: 'a'})\nrun.__dict__ = run",
    "property of a slot": "class D(list):\n __slots__ = 'a'\n def __getattr__(s, n): raise KeyError(n)\nrun = D([1])",
    "value of a member": "class D(enum.Enum):\n A = 1\n value = property(lambda s: 1 / 0)\nrun = D.A",
    "text of a path": "import pathlib\nclass D(pathlib.PurePosixPath):\n def __repr__(s): 1 / 0\nrun = D('a')",
    "items of a tuple": "class D(tuple):\n def __iter__(s): 1 / 0\nrun = {D((1, 2)), 3}",
    "items of an ordered dict": "class D(collections.OrderedDict):\n def __getitem__(s, k): 1 / 0\nrun = D(a=1)",
    "length of what is written": "class D(list):\n def __len__(s): 1 / 0\n"
    "class Own(Net):\n def forward(self, x): self.kept.append(x)\nrun = Own(kept=D())",
    "key of the dictionary below": "class D(collections.OrderedDict): pass\nrun = D(a=1)\n"
    "dict.__setitem__(run, 'b', 2)",
    "truth of its attributes": "class A(dict):\n def __bool__(s): 1 / 0\nclass D(dict): pass\n"
    "run = D(a=1)\nrun.__dict__ = A(b=2)",
    "attributes of settings": "import dataclasses\n@dataclasses.dataclass\nclass D:\n"
    " a: int = dataclasses.field(default_factory=int)\n def __getattr__(s, n): 1 / 0\nrun = D()\ndel run.a",
}
"""Values whose own code fails when it runs."""


@pytest.mark.parametrize("case", STRANGE)
def test_values_are_not_asked(case: str) -> None:
    assert digest(made(STRANGE[case])) == digest(made(STRANGE[case]))


def test_how_a_model_of_transformers_computes_counts_and_not_where_it_lay() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, bos_token_id=1, **sizes))
    model.set_attn_implementation("sdpa")
    before = digest(model)
    model.config.name_or_path = model.name_or_path = "elsewhere"
    assert model.config._name_or_path == "elsewhere"
    assert digest(model) == before
    model.set_attn_implementation("eager")
    eager = digest(model)
    model.loss_function = made("def run(x): return x")
    assert len({before, eager, digest(model)}) == 3
