"""Code in files: a user's module counts by what is taken from it, an installed one by its package's list of files."""

import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from qcompress.digests.libraries import _edition_of_package, edition_of
from tests.digests.test_identity import digest

Imported = Callable[..., ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Imported:
    """Function that imports a module from the text of its file, anew each time."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(source: str, name: str = "a_file_of_mine") -> ModuleType:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return load


def test_only_what_code_names_counts_of_a_users_file(imported: Imported) -> None:
    source = "import time\nSTART = time.time()\nSCALE, OTHER = {}, {}\ndef run(x): return x * SCALE"
    first, same, other = (digest(imported(source.format(*pair)).run) for pair in ((1, 1), (1, 2), (2, 1)))
    assert first == same != other


def test_an_attribute_that_is_set_from_outside_counts(imported: Imported) -> None:
    imported("SCALE = 1", "settings_of_mine")
    run = imported("import settings_of_mine as s\ndef run(x): return x * s.SCALE").run
    before = digest(run)
    sys.modules["settings_of_mine"].SCALE = 2  # type: ignore[attr-defined]
    assert digest(run) != before


PASSING_ON = [
    "import losses_of_mine as l\ndef run(x, name): return getattr(l, name)(x)",
    "import losses_of_mine as l\nTASKS = {'a': l}\ndef run(x): return TASKS['a'].loss(x)",
    "import losses_of_mine as l\ndef act(m, x): return m.loss(x)\ndef run(x): return act(l, x)",
    "def run(x, name):\n import losses_of_mine as l\n return getattr(l, name)(x)",
    "def run(x):\n from losses_of_mine import loss\n return loss(x)",
]


@pytest.mark.parametrize("source", PASSING_ON)
def test_what_a_module_that_is_passed_on_imports_counts(imported: Imported, source: str) -> None:
    found = []
    for scale in (1, 1, 2):
        imported(f"SCALE = {scale}", "core_of_mine")
        imported("from core_of_mine import SCALE\ndef loss(x): return x * SCALE", "losses_of_mine")
        found.append(digest(imported(source).run))
    assert found[0] == found[1] != found[2]


def test_a_module_that_a_model_holds_counts_with_all_that_it_holds(imported: Imported) -> None:
    model = nn.Linear(1, 1)
    found = []
    for source in ("SCALE = 1", "SCALE = 1", "SCALE = 2", "SCALE = 1\ndef act(x): return x"):
        model.settings = imported(source, "settings_of_mine")  # type: ignore[assignment]
        found.append(digest(model))
    model.settings.SCALE = 3  # type: ignore[union-attr]
    assert found[0] == found[1]
    assert len({*found, digest(model)}) == 4


LIBRARY = """
from torch import nn
class Composed(nn.Module):
    def __init__(self, **given):
        super().__init__()
        vars(self).update(given)
def act(x): return x * {}
"""


@pytest.fixture
def library(tmp_path: Path, imported: Imported) -> Callable[[float], Any]:
    """Function that imports an installed module with a number in it, which is also in its list of files."""
    record = tmp_path / "a_library-1.0.dist-info"
    record.mkdir()

    def install(scale: float) -> Any:
        (record / "RECORD").write_text(f"a_library.py,sha256={scale},\na_library-1.0.dist-info/RECORD,,\n")
        _edition_of_package.cache_clear()
        return imported(LIBRARY.format(scale), "a_library")

    return install


def test_code_of_a_library_counts_as_it_is_installed(library: Callable[[float], Any]) -> None:
    assert digest(library(1).act) == digest(library(1).act) != digest(library(2).act)


def test_code_of_qcompress_under_development_counts_by_its_file(tmp_path: Path, imported: Imported) -> None:
    record = tmp_path / "mine_in_development-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: mine_in_development")
    (record / "RECORD").write_text("mine_in_development-1.0.dist-info/RECORD,,\n")
    imported("SCALE = 1", "mine_in_development")
    assert edition_of("mine_in_development") == hashlib.sha256(b"SCALE = 1").hexdigest()


@pytest.mark.parametrize(
    "held",
    [
        lambda k: [nn.Hardtanh(-k, k)],
        lambda k: {"k": torch.tensor([k])},
        lambda k: [lambda x: x * k],
    ],
)
def test_whatever_a_module_of_a_library_is_given_counts(
    library: Callable[[float], Any], held: Callable[[float], Any]
) -> None:
    kind = library(1).Composed
    assert digest(kind(kept=held(1.0))) == digest(kind(kept=held(1.0))) != digest(kind(kept=held(2.0)))


def test_a_method_of_the_users_in_a_class_of_a_library_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Identity()
    before = digest(model)
    monkeypatch.setattr(nn.Identity, "forward", lambda self, x: x * 2)
    assert digest(model) != before


SCRIPT = """
import numba, pydantic
from qcompress.identity import identify
@numba.njit
def twice(x): return 2 * x
class Settings(pydantic.BaseModel):
    scale: float = 1.0
settings = Settings()
def loss(output, batch): return twice(output) * settings.scale
def late(output, batch):
    import wave
    return output
before = identify(late)
import wave
assert identify(late) == before
print(identify(loss))
"""


@pytest.mark.slow
def test_what_libraries_make_anew_in_every_process_does_not_count() -> None:
    pytest.importorskip("pydantic")
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, env={**os.environ, **seed}
        ).stdout
        for seed in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert len(found) == 1
    assert "unchecked=()" in found.pop()
