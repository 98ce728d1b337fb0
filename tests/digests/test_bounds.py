"""What digests leave out, and that values whose own code fails have one: one line a case."""

import pytest

from tests.digests.test_identity import digest
from tests.digests.test_kinds import made

SAME = {
    "documentation": ("def run(x):\n '{}'\n return x", "text", "other text"),
    "a global like an attribute": ("layer = {}\ndef run(x): return x.layer", "2", "3"),
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
    "value of a member": "class D(enum.Enum):\n A = 1\n value = property(lambda s: 1 / 0)\nrun = D.A",
    "text of a path": "import pathlib\nclass D(pathlib.PurePosixPath):\n def __repr__(s): 1 / 0\nrun = D('a')",
    "items of a tuple": "class D(tuple):\n def __iter__(s): 1 / 0\nrun = {D((1, 2)), 3}",
    "items of an ordered dict": "class D(collections.OrderedDict):\n def __getitem__(s, k): 1 / 0\nrun = D(a=1)",
    "length of a list": "class D(list):\n def __len__(s): 1 / 0\n"
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
