"""What models, classes and functions hold counts."""

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from qcompress.digests import tensors
from qcompress.identity import identify
from qcompress.model.losses import as_loss
from tests.digests.test_identity import Settings, compiled, digest, scaled
from tests.models import Residual, seeded


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
    parts = tensors.of_values

    def noted(digest: Any, value: Any, name: str) -> Any:
        read.append(name)
        return parts(digest, value, name)

    monkeypatch.setattr(tensors, "of_values", noted)
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
    return [*held, seeded(Residual), scaled(2.0), {"b", "a", "c"}, torch.arange(5), of_class({"a": {1, 2}})]


@pytest.mark.slow
def test_another_process_finds_the_same_digests_of_what_models_hold() -> None:
    code = (
        "from qcompress.identity import identify; from tests.digests.test_held import several;"
        "print(identify(several()).digest)"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    }
    assert found == {identify(several()).digest}


def test_a_librarys_functions_in_a_class_are_read_if_they_are_pythons() -> None:
    class Marked(Tensor):
        shift = 1.0

    assert digest(Own(lambda k: torch.full((1,), k).as_subclass(Marked), 1.0))
