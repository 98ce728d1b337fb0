"""Digests: equal for equal values in every process, different where a result would differ, honest about the rest."""

import functools
import gc
import re
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompress.identity import identified_once, identify, identify_batches, once
from qcompress.measuring.options_by_layer import Offered
from qcompress.options import prune_quantize
from tests.models import Residual, TiedLanguageModel, seeded


def digest(value: Any) -> str:
    identity = identify(value)
    assert not identity.unchecked
    return identity.digest


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(first=plain, second=plain)
def test_plain_values_have_one_digest_exactly_when_their_text_is_the_same(first: Any, second: Any) -> None:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return repr({key: text(item) for key, item in value.items()})
        return repr([text(item) for item in value]) if isinstance(value, list) else repr(value)

    assert (digest(first) == digest(second)) == (text(first) == text(second))


def nested(lengths: list[int]) -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(length) for length in lengths], layout=torch.jagged)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        ([[1], 2], [[1, 2]]),
        ("1", 1),
        (np.array(["a", None], dtype=object), np.array(["a", "b"], dtype=object)),
        (nested([2, 1]), nested([3])),
        (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
        (range(3), range(4)),
        ({1, 2}, {1, 3}),
        ({"relu": 1, "cos": 1}, {"cos": 1, "relu": 1}),
        (np.random.default_rng(0), np.random.default_rng(1)),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
    ],
)
def test_values_that_differ_have_other_digests(first: Any, second: Any) -> None:
    assert digest(first) != digest(second)
    assert digest(first) == digest(first)


@given(order=st.permutations(["0", "2", "*"]))
def test_the_order_of_patterns_counts(order: list[str]) -> None:
    options = {"0": prune_quantize(bits=(2,)), "2": prune_quantize(bits=(4,)), "*": prune_quantize(bits=(8,))}
    offered = Offered.of({pattern: options[pattern] for pattern in order})
    assert (digest(offered.to_json()) == digest(Offered.of(options).to_json())) == (order == list(options))


def scaled(factor: float, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda x: factor * x + shift


def compiled(source: str, **globals_: Any) -> Any:
    module = types.ModuleType("a_users_module")
    vars(module).update(globals_)
    exec(source, vars(module))  # noqa: S102 - the only way to have two functions of one name
    return vars(module)["run"]


def test_functions_differ_by_closure_defaults_code_and_what_they_call() -> None:
    assert digest(scaled(2.0)) == digest(scaled(2.0)) != digest(scaled(3.0))
    assert digest(compiled("def run(x): return x + 1")) == digest(compiled("\n\ndef run(x):\n    return x + 1"))
    assert digest(compiled("def run(x): return x + 1")) != digest(compiled("def run(x): return x + 2"))
    assert digest(compiled("def run(x, y=1): return x")) != digest(compiled("def run(x, y=2): return x"))
    calling = "def inner(x): return {}\ndef run(x): return inner(x)"
    assert digest(compiled(calling.format("x"))) != digest(compiled(calling.format("-x")))
    within = "def run(x): return [item + {} for item in x]"
    assert digest(compiled(within.format(1))) != digest(compiled(within.format(2)))
    assert digest(compiled("def run(x): return x * SCALE", SCALE=1)) != digest(
        compiled("def run(x): return x * SCALE", SCALE=2)
    )


def test_a_users_function_counts_also_within_a_decorator_of_a_library() -> None:
    wrapped = [torch.no_grad()(compiled(f"def run(x): return x + {shift}")) for shift in (1, 1, 2)]
    assert digest(wrapped[0]) == digest(wrapped[1]) != digest(wrapped[2])


def test_what_a_module_of_the_users_own_gives_counts_and_a_library_counts_by_name() -> None:
    def through(value: float) -> Any:
        helpers = types.ModuleType("some_helpers")
        helpers.SCALE, helpers.OTHER = value, object()  # type: ignore[attr-defined]
        return compiled("def run(x): return x * helpers.SCALE", helpers=helpers)

    assert digest(through(1.0)) == digest(through(1.0)) != digest(through(2.0))
    assert digest(torch.relu) == digest(torch.relu) != digest(torch.tanh)
    assert digest(nn.functional.cross_entropy) != digest(nn.functional.mse_loss)


def test_methods_partials_and_objects_differ_by_what_they_hold() -> None:
    class Scale:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def run(self, x: float) -> float:
            return self.factor * x

    assert digest(Scale(1).run) == digest(Scale(1).run) != digest(Scale(2).run)
    assert digest(functools.partial(pow, 2)) != digest(functools.partial(pow, 3))
    assert digest(functools.lru_cache(scaled(1.0))) != digest(functools.lru_cache(scaled(2.0)))


def test_models_differ_by_weights_settings_hooks_and_ties() -> None:
    first = seeded(Residual)
    assert digest(first) == digest(seeded(Residual)) != digest(seeded(Residual, seed=1))
    tied, untied = seeded(TiedLanguageModel), seeded(TiedLanguageModel)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())  # type: ignore[union-attr,operator]
    assert digest(tied) != digest(untied)
    other = seeded(Residual)
    other.body[0].stride = (2, 2)  # type: ignore[index,union-attr]
    assert digest(first) != digest(other)
    hooked = seeded(Residual)
    hooked.head.register_forward_hook(lambda module, args, output: -output)  # type: ignore[union-attr]
    assert digest(first) != digest(hooked)
    hidden = seeded(Residual)
    hidden.register_buffer("scale", torch.ones(1), persistent=False)
    assert digest(first) != digest(hidden)


@dataclass
class Settings:
    """What a model's forward pass reads besides its modules' attributes, in the form of transformers."""

    cap: float
    name_or_path: str = ""
    inner: "Settings | None" = None
    widths: list[int] = field(default_factory=list)
    transformers_version: str = ""


def test_models_differ_by_their_settings_but_not_by_where_they_come_from() -> None:
    def having(settings: Any) -> str:
        model = seeded(Residual)
        model.config = model.head.config = settings  # type: ignore[union-attr]
        return digest(model)

    around = Settings(1.0)
    around.inner = around
    different = [
        Settings(1.0),
        Settings(2.0),
        Settings(1.0, inner=Settings(1.0)),
        Settings(1.0, inner=Settings(2.0)),
        Settings(1.0, widths=[3]),
        around,
        types.SimpleNamespace(cap=1.0),
    ]
    assert len({having(settings) for settings in different}) == len(different)
    assert having(Settings(1.0)) == having(Settings(1.0, "elsewhere"))


def test_labels_of_transformers_are_settings_like_others_in_a_users_own_modules() -> None:
    def having(**attributes: Any) -> str:
        model = seeded(Residual)
        vars(model).update(attributes)
        return digest(model)

    different: list[dict[str, Any]] = [
        {"architectures": "wide"},
        {"architectures": "deep"},
        {"name_or_path": "relu"},
        {"name_or_path": "tanh"},
        {"settings": types.SimpleNamespace(architectures="wide")},
        {"settings": types.SimpleNamespace(architectures="deep")},
        {"settings": types.SimpleNamespace(training=True)},
    ]
    assert len({having(**attributes) for attributes in different}) == len(different)


def test_a_value_that_holds_itself_has_a_digest() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    assert digest(circle) != digest([1, [1]])


def test_what_cannot_be_looked_into_is_named_with_its_way_there(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w")

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        log.write("called")
        return model(batch)

    assert identify(forward, "forward").unchecked == ("forward.log: TextIOWrapper",)
    assert identify([threading.Lock(), torch.empty(2, device="meta")], "state").unchecked == (
        "state: lock",
        "state: Tensor",
    )
    log.close()


def test_all_batches_count_and_their_order() -> None:
    batches = [torch.full((2,), float(i)) for i in range(3)]
    assert identify_batches(batches) == identify_batches(iter(batches))
    assert identify_batches(batches) != identify_batches(batches[:2])
    assert identify_batches(batches) != identify_batches(batches[::-1])
    assert identify_batches(batches) != identify_batches([*batches[:2], batches[2] + 1])


def test_another_process_finds_the_same_digests() -> None:
    code = (
        "import torch; from qcompress.identity import identify; from tests.models import Residual, seeded;"
        "from tests.digests.test_identity import scaled;"
        "print(identify([seeded(Residual), scaled(2.0), {'b', 'a', 'c'}, torch.arange(5)]).digest)"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    }
    assert found == {identify([seeded(Residual), scaled(2.0), {"b", "a", "c"}, torch.arange(5)]).digest}


def test_a_model_whose_identity_was_found_is_not_kept_alive() -> None:
    with identified_once():
        model = Residual()
        gone, before = weakref.ref(model), once(model, find=functools.partial(identify, model))
        model.seen = 1
        assert once(model, find=functools.partial(identify, model)) == before
        del model
        gc.collect()  # modules hold themselves in cycles
        assert gone() is None
