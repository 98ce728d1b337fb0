"""What models, classes and functions hold: the user's counts, a library's does not, what a pass may write is named."""

import functools
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from qcompress.digests.bytecode import imports_of, rebound_by, written_by
from qcompress.digests.words import HashedWords
from qcompress.identity import identify
from qcompress.model.losses import as_loss
from tests.model.test_plain_state import Scaled, Storing
from tests.models import Residual, seeded
from tests.test_identity import Settings, compiled, digest, scaled


class Config:
    """Settings in an ordinary class."""

    def __init__(self, cap: float) -> None:
        self._cap, self.tensors = cap, [torch.tensor(cap)]


class Slotted:
    """Settings with a slot below an ordinary class."""

    __slots__ = ("cap",)


class Below(Slotted):
    """Has attributes besides the slot."""

    def __init__(self, cap: float) -> None:
        self.cap, self.other = cap, 1.0


class Normal(torch.distributions.Normal):
    """A user's class whose tensors a library's class assigns."""


class Own(nn.Module):
    """A user's module whose output depends on what ``made`` returns for a number."""

    def __init__(self, made: Callable[[float], Any], number: float) -> None:
        super().__init__()
        self.layer = seeded(lambda: nn.Linear(3, 3))
        self.__dict__["_kept"] = made(number)  # a module here is none of the submodules

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self._kept
        return out


HELD: dict[str, Callable[[float], Any]] = {
    "number": lambda k: k,
    "tensor": torch.tensor,
    "array": lambda k: np.array([k]),
    "list of tensors": lambda k: [torch.tensor(k)],
    "mixed dict": lambda k: {"n": 1, "k": [torch.tensor(k)]},
    "ordinary object": Config,
    "slots": Below,
    "of a library's class": lambda k: Normal(0.0, k),
    "objects in a list": lambda k: [Config(k)],
    "dataclass": lambda k: Settings(k),
    "distribution": lambda k: torch.distributions.Normal(0.0, k),
    "module": lambda k: seeded(lambda: nn.Linear(1, 1), seed=int(k)),
    "modules in a list": lambda k: [seeded(lambda: nn.Linear(1, 1), seed=int(k))],
    "graph": lambda k: torch.fx.symbolic_trace(nn.Hardtanh(-k, k)),
}


@pytest.mark.parametrize("name", HELD)
def test_whatever_a_users_module_holds_counts(name: str) -> None:
    def public(number: float) -> nn.Module:
        model = seeded(Residual)
        vars(model)["kept"] = HELD[name](number)
        return model

    for make in (lambda k: Own(HELD[name], k), public, lambda k: [Own(HELD[name], k)]):
        assert digest(make(1.0)) == digest(make(1.0)) != digest(make(3.0))


def of_class(value: Any, key: str = "KEPT") -> nn.Module:
    kind = type("Classy", (nn.Module,), {key: value, "__module__": "a_users_module"})
    made: nn.Module = kind()
    return made


def test_what_a_users_class_holds_counts() -> None:
    for key in ("KEPT", "_KEPT"):
        for make in (float, torch.tensor, lambda k: (k,), lambda k: {"k": [k]}, Config):
            assert digest(of_class(make(1.0), key)) == digest(of_class(make(1.0), key))
            assert digest(of_class(make(1.0), key)) != digest(of_class(make(3.0), key))


def test_a_users_class_counts_below_a_parametrization() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def having(value: float) -> nn.Module:
        model = Own(float, value)
        vars(model.layer)["_own"] = value  # of PyTorch's own class
        torch.nn.utils.parametrize.register_parametrization(model.layer, "weight", Doubled())
        return model

    assert digest(having(1.0)) == digest(having(1.0)) != digest(having(2.0))


def test_private_attributes_that_libraries_set_and_numbers_of_hooks_do_not_count() -> None:
    model = seeded(Residual)
    before = digest(model)
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    model.register_forward_hook(print).remove()
    assert digest(model) == before
    model.handle = model.register_forward_hook(print)  # type: ignore[assignment]
    hooked = digest(model)
    model.handle.remove()  # type: ignore[operator]
    model.handle = model.register_forward_hook(print)  # type: ignore[assignment]
    assert digest(model) == hooked != before


class Gain(type):
    """A metaclass with a setting for its classes."""

    factor = 1.0


class Kept(metaclass=Gain):
    """A class with constants whose names look like Python's."""

    _scale_ = (1.0,)


class Odd(nn.Module):
    """Reads what looks like a library's or Python's own, besides a private attribute of PyTorch's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self._hf_scale = seeded(lambda: nn.Linear(3, 3)), 1.0
        self.layer._act_scale = 1.0  # type: ignore[assignment]
        self.layer.register_forward_hook(lambda module, args, output: output * module._act_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self._hf_scale * Kept._scale_[0] * Kept.factor  # type: ignore[no-any-return]


def test_what_looks_like_a_librarys_and_is_the_users_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    before = digest(model)
    for owner, name in ((model, "_hf_scale"), (model.layer, "_act_scale"), (Kept, "_scale_"), (Gain, "factor")):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, 2.0)
            assert digest(model) != before
    assert digest(model) == before == digest(Odd())


def test_a_global_with_the_name_of_an_attribute_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(Odd())
    monkeypatch.setitem(globals(), "layer", torch.ones(3))
    assert digest(Odd()) == before


def test_a_pass_of_the_users_does_not_change_the_digest_and_what_it_may_write_is_named() -> None:
    data = torch.ones(2, 12)
    for make in (Storing, Scaled):
        model = make()
        before = identify(model, "model")
        for _ in range(2):
            model(data)
        after = identify(model, "model")
        assert before.digest == after.digest
        named = {item.partition(":")[0] for item in after.unchecked}
        assert named >= {Storing: {"model.hidden", "model.head.inputs", "model.seen", "model.plain"}}.get(make, set())
        assert ("model.scale: float" in after.unchecked) == (make is Scaled)
    assert not identify(Scaled()).unchecked  # nothing is stored yet


class Counter:
    """Counts in an attribute of its own, in a method that passes call."""

    def __init__(self) -> None:
        self.calls, self.step = 0, 1

    def tick(self) -> None:
        self.calls += self.step


class Counting(nn.Module):
    """Writes attributes in ways that its ``forward`` does not show."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.counter, self.layer, self._times = Counter(), nn.Identity(), 0
        self.counter.step, self.parent = step, weakref.ref(self)
        self.rng = np.random.default_rng(0)
        self.layer.register_forward_hook(lambda module, args, output: setattr(self, "_last", output))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        self.counter.tick()
        return count_in(self, self.layer(x))

    def unused(self, step: int) -> None:
        self.counter.step = step


def count_in(module: Any, x: Tensor) -> Tensor:
    module._times += 1
    module.rng.random()
    return x


def test_what_passes_write_is_found_in_methods_functions_and_hooks() -> None:
    model = Counting(1)
    before = identify(model, "model").digest
    model(torch.ones(1, 2))
    named = ("model.counter.calls: int", "model._last: Tensor", "model._times: int", "model.rng: Generator")
    found = identify(model, "model")
    assert set(found.unchecked) == set(named)
    assert found.digest == before == identify(Counting(1)).digest != identify(Counting(2)).digest


class Recorder:
    """A hook that keeps what it has seen."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.outputs, self.calls = factor, [], 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.outputs.append(output)
        self.calls += 1
        return output * self.factor


PASSES = 0


class Remembering(nn.Module):
    """Writes what it finds out once, what its layers gave, and how often it ran."""

    passes, shift = 0, 1.0

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.layers[0].register_forward_hook(Recorder(factor))
        self.layers[1].register_forward_hook(Recorder(factor).__call__)

    @functools.cached_property
    def scale(self) -> Tensor:
        return torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        global PASSES
        PASSES += 1
        type(self).passes += 1
        for number, layer in enumerate(self.layers):
            setattr(self, f"act_{number}", layer(x))
        return x * self.scale + self.shift


def test_what_hooks_classes_and_texts_keep_of_a_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Remembering()
    before = identify(model, "model").digest
    with torch.no_grad():
        model(torch.ones(1, 2))
    found = identify(model, "model")
    assert found.digest == before
    names = ("act_0: Tensor", "act_1: Tensor", "scale: Tensor", "passes: int", "calls: int", "outputs: list")
    assert set(found.unchecked) == {*(f"model.{name}" for name in names), "model.forward.PASSES: int"}
    model.layers[0].register_forward_hook(Recorder(2.0))
    other = identify(model).digest
    model.layers[0]._forward_hooks.popitem()
    model.layers[0].register_forward_hook(Recorder(3.0))
    assert len({before, other, identify(model).digest}) == 3
    model.layers[0]._forward_hooks.popitem()
    monkeypatch.setattr(Remembering, "shift", 2.0)
    assert identify(model).digest != before


def test_only_the_ends_of_an_f_string_name_what_code_may_assign() -> None:
    def told(self: Any, number: int, x: Tensor) -> str:
        if number > 3:
            raise ValueError(f"x{number} is too large beside e{len(self.layers) + number}, {x!r:>{number}} of {self}")
        vars(self)[f"{number}_kept"] = setattr(self, f"{'a' if number else 'b'}_{number}", x)
        return f"{number}{x}"

    assert {name for name in rebound_by(told.__code__) if "*" in name} == {"x*", "*_kept"}


def test_what_libraries_note_in_a_first_pass_does_not_count() -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=8, **settings)).eval()
    compiled_part = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    runs = (
        (bert, {"input_ids": torch.ones(1, 2, dtype=torch.long), "output_hidden_states": True}),
        (compiled_part, {"input": torch.ones(1, 2)}),
    )
    for model, batch in runs:
        before = digest(model)
        with torch.no_grad():
            model(**batch)
        assert digest(model) == before


def test_weights_are_read_once_wherever_else_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listing(nn.Module):
        def __init__(self, start: int) -> None:
            super().__init__()
            self.layer = seeded(lambda: nn.Linear(4, 4))
            self.all, self._part = list(self.parameters()), self.layer.weight.detach()[start:2]
            self.others = [nn.Sequential(self.layer)]

    read: list[str] = []
    parts = HashedWords._of_tensor

    def noted(self: Any, value: Any, name: str) -> Any:
        read.append(name)
        return parts(self, value, name)

    monkeypatch.setattr(HashedWords, "_of_tensor", noted)
    found = [digest(Listing(start)) for start in (0, 0, 1)]
    assert read == 3 * ["value.layer.weight", "value.layer.bias"]
    assert found[0] == found[1] != found[2]


def test_attributes_of_functions_and_constants_of_inner_modules_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def having(value: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            return x * run.k  # type: ignore[attr-defined,no-any-return]

        run.k = value  # type: ignore[attr-defined]
        return run

    assert digest(having(1.0)) == digest(having(1.0)) != digest(having(2.0))
    assert digest(having([torch.ones(1)])) != digest(having([torch.zeros(1)]))

    package, inner = types.ModuleType("a_package"), types.ModuleType("a_package.inner")
    package.inner, package.__file__, inner.__file__ = inner, "a.py", "b.py"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_package", package)
    monkeypatch.setitem(sys.modules, "a_package.inner", inner)
    sources = {
        "def run(x): return x * a_package.inner.SCALE": {"a_package": package},
        "def run(x):\n    from a_package.inner import SCALE\n    return x * SCALE": {},
        "def run(x):\n    from .inner import SCALE\n    return x * SCALE": {"__package__": "a_package"},
        "def run(x):\n    import a_package.inner as other\n    return x * other.SCALE": {},
    }
    for source, globals_ in sources.items():
        found = []
        for value in (1.0, 1.0, 2.0):
            inner.SCALE = value  # type: ignore[attr-defined]
            found.append(digest(compiled(source, **globals_)))
        assert found[0] == found[1] != found[2]
    missing = compiled("def run(x):\n    import a_module_of_mine\n    import wave\n    return x")
    assert identify(missing, "run").unchecked == ("run.a_module_of_mine: module that is not imported yet",)


class Weighted(nn.Module):
    """A loss with weights of classes in a plain tensor, and a private factor."""

    def __init__(self, weights: Tensor, factor: float) -> None:
        super().__init__()
        self.weights, self._factor = weights, factor

    def forward(self, output: Tensor, batch: Tensor) -> Tensor:
        return self._factor * (output.square() * self.weights).sum(-1)


def test_a_loss_that_is_a_module_counts_with_all_that_it_holds() -> None:
    losses = [(torch.ones(3), 1.0), (torch.ones(3), 2.0), (torch.tensor([1.0, 1.0, 2.0]), 1.0)]
    assert len({digest(as_loss(Weighted(weights, factor))) for weights, factor in losses}) == 3
    assert digest(as_loss(Weighted(*losses[0]))) == digest(as_loss(Weighted(*losses[0])))


def several() -> list[Any]:
    held = [Own(made, 2.0) for made in HELD.values()]
    return [*held, seeded(Residual), scaled(2.0), {"b", "a", "c"}, torch.arange(5), Storing(), of_class({"a": {1, 2}})]


def test_another_process_finds_the_same_digests_of_what_models_hold() -> None:
    code = (
        "from qcompress.identity import identify; from tests.test_ownership import several;"
        "print(identify(several()).digest)"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    }
    assert found == {identify(several()).digest}


class Windowed(nn.Module):
    """A network whose settings are read in lines that assign an item."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self._fill = window, 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[:, self.window :] = self._fill
        return out


def test_settings_in_a_line_that_assigns_an_item_count() -> None:
    found = identify(Windowed(1))
    assert not found.unchecked
    assert found.digest == identify(Windowed(1)).digest != identify(Windowed(2)).digest


def long_function(imported: str, attribute: str) -> types.CodeType:
    """Code with so many names that the arguments of later instructions are longer than a byte."""
    names = "\n".join(f"    name_{number} = other_{number}" for number in range(300))
    scope: dict[str, Any] = {}
    exec(f"def run(self):\n{names}\n    import {imported}\n    self.{attribute}.append(1)", scope)  # noqa: S102
    code: types.CodeType = scope["run"].__code__
    return code


def test_long_functions_are_read_like_short_ones() -> None:
    code = long_function("os.path", "seen")
    assert imports_of(code) == {(0, "os.path")}
    assert "seen" in written_by(code)


def test_a_librarys_functions_in_a_class_are_read_if_they_are_pythons() -> None:
    class Marked(Tensor):
        shift = 1.0

    assert digest(Own(lambda k: torch.full((1,), k).as_subclass(Marked), 1.0))


def test_objects_that_answer_every_name_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Proxy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    monkeypatch.setitem(globals(), "count_in", Proxy())
    assert identify(Counting(1)).digest
