"""The walk ends on whatever values refer to each other, and knows whose a module is."""

import functools
import importlib
import site
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompress.digests.libraries import is_library, is_library_module
from qcompress.identity import identify, identify_batches
from tests.digests.test_identity import compiled, digest
from tests.models import Residual, seeded

KINDS: dict[str, Callable[[], Any]] = {
    "list": list,
    "dict": dict,
    "namespace": types.SimpleNamespace,
    "class": lambda: type("Made", (), {"__module__": "a_users_module"}),
    "function": lambda: compiled("def run(x): return x"),
}


def linked(kinds: list[str], links: list[tuple[int, int]], leaf: int) -> Any:
    """Values of these kinds, of which each may hold others, itself and all of them in a set; the last holds a leaf."""
    nodes = [KINDS[kind]() for kind in kinds]
    links = [*links, *((place, place + 1) for place in range(len(nodes) - 1))]
    hashable = {node for node in nodes if isinstance(node, (type, types.FunctionType))}
    for number, (first, second) in enumerate(links):
        put(nodes[first % len(nodes)], f"to_{number}", nodes[second % len(nodes)])
    put(nodes[0], "all", hashable)
    put(nodes[-1], "leaf", leaf)
    return nodes[0]


def put(node: Any, key: str, value: Any) -> None:
    if isinstance(node, list):
        node.append(value)
    elif isinstance(node, dict):
        node[key] = value
    else:
        setattr(node, key, value)


@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=8),
    links=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12),
)
def test_values_that_refer_to_each_other_have_digests(kinds: list[str], links: list[tuple[int, int]]) -> None:
    one, same, other = (identify(linked(kinds, links, leaf)) for leaf in (1, 1, 2))
    assert one == same
    assert one.digest != other.digest


class Listed(nn.Module):
    """Knows all its kin in a set, as some registries do."""

    def __init__(self, kin: set[Any]) -> None:
        super().__init__()
        self.layer, self.kin = nn.Identity(), kin

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if type(self) in KNOWN else x  # type: ignore[no-any-return]


KNOWN = {Listed, Residual}


def test_sets_that_hold_what_holds_them_have_digests() -> None:
    def having(count: int) -> str:
        kin: set[Any] = set()
        model = nn.Sequential(*(Listed(kin) for _ in range(count)))
        kin.update(model)
        return digest(model)

    assert having(2) == having(2) != having(3)
    handlers = "def run(x): return x if run in ALL else {}\ndef other(x): return run(x)\nALL = {{run, other}}"
    assert digest(compiled(handlers.format(1))) == digest(compiled(handlers.format(1)))
    assert digest(compiled(handlers.format(1))) != digest(compiled(handlers.format(2)))
    assert digest({(1, "a"), (2, frozenset({"b"}))}) != digest({(1, "a"), (2, frozenset({"c"}))})
    assert identify({torch.ones(1), torch.zeros(1)}, "kept").unchecked == ("kept: Tensor",)


def test_a_tree_with_links_to_its_root_has_a_digest() -> None:
    def having(name: str) -> str:
        model = seeded(Residual)
        root: dict[str, Any] = {"name": "root", "children": []}
        root["children"].append({"name": name, "parent": root})
        model.tree = root  # type: ignore[assignment]
        return digest(model)

    assert having("leaf") == having("leaf") != having("twig")


def test_the_depth_of_calls_and_of_containers_does_not_count() -> None:
    depth = 3 * sys.getrecursionlimit()

    def chain(last: int) -> str:
        steps = "\n".join(f"def step_{place}(x): return step_{place + 1}(x)" for place in range(depth))
        return digest(compiled(f"{steps}\ndef step_{depth}(x): return x + {last}\ndef run(x): return step_0(x)"))

    def nested(value: Any) -> str:
        for _ in range(depth):
            value = [value]
        return digest(value)

    assert chain(1) != chain(2)
    assert nested(1) != nested(2)


def test_a_folder_without_init_and_a_module_made_by_hand_are_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_namespace").mkdir()
    (tmp_path / "a_namespace" / "settings.py").write_text("SCALE = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    by_hand = types.ModuleType("a_module_by_hand")
    for name in ("a_namespace", "a_namespace.settings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, by_hand.__name__, by_hand)
    settings: Any = importlib.import_module("a_namespace.settings")
    found = []
    for value in (1, 1, 2):
        settings.SCALE = by_hand.SCALE = value  # type: ignore[attr-defined]
        of_namespace = compiled(
            "def run(x): return x * a_namespace.settings.SCALE", a_namespace=sys.modules["a_namespace"]
        )
        found.append((digest(of_namespace), digest(compiled("def run(x): return x * made.SCALE", made=by_hand))))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize("folder", [site.getusersitepackages(), *map(sysconfig.get_path, ("stdlib", "purelib"))])
def test_what_is_installed_anywhere_is_a_librarys(folder: str) -> None:
    assert is_library_module(placed(f"{folder}/installed.py"), "installed")
    assert not is_library_module(placed(f"{sysconfig.get_path('stdlib')}-of-mine/installed.py"), "installed")
    assert is_library(sys.intern)
    assert not is_library_module(sys, "__main__")


def placed(file: str) -> types.ModuleType:
    module = types.ModuleType("installed")
    module.__file__ = file
    return module


def test_packages_that_an_installation_elsewhere_recorded_are_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recorded_elsewhere").mkdir()
    (tmp_path / "recorded_elsewhere" / "__init__.py").write_text("def called(): pass\n")
    (tmp_path / "beside_the_recorded.py").write_text("def called(): pass\n")
    record = tmp_path / "recorded_elsewhere-1.0.dist-info"
    record.mkdir()
    (record / "RECORD").write_text("recorded_elsewhere/__init__.py,,\nrecorded_elsewhere-1.0.dist-info/RECORD,,\n")
    developed = tmp_path / "beside.egg-info"
    developed.mkdir()
    (developed / "SOURCES.txt").write_text("beside_the_recorded.py\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed, own = map(importlib.import_module, ("recorded_elsewhere", "beside_the_recorded"))
    assert is_library(installed.called)
    assert not is_library(own.called)


class Hostile:
    """Fails or lies when it is asked what it is made of."""

    def __init__(self, reduced: Any) -> None:
        self._reduced = reduced

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._reduced

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("reduced", [None, 5, (), (int,), (int, None), "a name"])
def test_objects_that_cannot_be_read_are_named(reduced: Any) -> None:
    assert identify(Hostile(reduced), "held").unchecked == ("held: Hostile",)
    assert identify({Hostile(reduced): 1}, "held").unchecked == ("held: Hostile",)


class StateOfTensor:
    """Is copied by a number in a tensor."""

    def __init__(self, number: float) -> None:
        self.number = torch.tensor(number)

    def __getstate__(self) -> Tensor:
        return self.number


def test_any_state_counts() -> None:
    class Mapped(StateOfTensor):
        def __getstate__(self) -> Any:
            return {0: float(self.number)}

    for kind in (StateOfTensor, Mapped):
        assert digest(kind(1.0)) == digest(kind(1.0)) != digest(kind(2.0))


def test_layouts_operators_and_sets_of_values_are_known_by_their_texts() -> None:
    values = [torch.contiguous_format, torch.channels_last, torch.strided, torch.ops.aten.relu, torch.ops.aten.abs]
    assert len({digest(value) for value in values}) == len(values)
    sets = [{torch.float32, torch.int8}, {torch.float32, torch.int16}, {Path("a"), Path("b")}, {Path("a"), Path("c")}]
    assert len({digest(value) for value in sets}) == len(sets)


def test_a_module_that_stands_in_two_places_counts_in_both() -> None:
    def blocks(order: str) -> nn.Module:
        torch.manual_seed(0)
        found = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "r": nn.ReLU()}
        return nn.Sequential(*(found[name] for name in order))

    orders = ["aba", "abb", "ab", "abab", "arb", "arbr"]
    assert len({digest(blocks(order)) for order in orders}) == len(orders)


def test_the_mode_counts_of_a_module_that_a_function_holds() -> None:
    def loss(training: bool) -> Callable[[Tensor], Tensor]:
        judge = nn.Sequential(nn.Dropout()).train(training)
        return lambda output: judge(output)

    assert digest(loss(True)) == digest(loss(True)) != digest(loss(False))
    assert digest(nn.Dropout().train()) == digest(nn.Dropout().eval())  # a model runs in evaluation mode


def test_weak_mappings_and_methods_of_any_kind_count() -> None:
    key = compiled("def run(x): return x")
    assert digest(weakref.WeakKeyDictionary({key: 1})) != digest(weakref.WeakKeyDictionary({key: 2}))

    def having(scale: float) -> type:
        called = functools.partialmethod(lambda self, k: k, k=scale)
        return type("Made", (), {"__call__": called, "__module__": "a_users_module"})

    assert digest(having(1.0)) == digest(having(1.0)) != digest(having(2.0))


def test_the_environment_is_named() -> None:
    for source in (
        "from os import environ\ndef run(x): return environ[x]",
        "import os\ndef run(x): return os.environ[x]",
    ):
        assert identify(compiled(source), "loss").unchecked == ("loss.environ: what it finds when it runs",)


def test_classes_are_read_once_for_all_batches() -> None:
    assert identify_batches([torch.ones(1), torch.ones(1)]) != identify_batches([torch.ones(1)])
    twice, apart = [[each, each] for each in ([1], [2])], [[[1], [1]], [[2], [2]]]
    assert identify_batches(twice) == identify_batches(twice) != identify_batches(apart)
