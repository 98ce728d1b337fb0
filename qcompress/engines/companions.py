"""Companions: small files that settings of an engine ask for besides its own file (`qcompress.engines.base.Companion`).

Invariants: companions are moved into place only together with the engine's file, so a rejected file leaves none behind;
they never replace a file of another kind.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from formulations.files import missing_folder, replacing
from qcompress.engines.base import Companion, Engine
from qcompress.errors import EngineError, OptionsError

LARGEST = 2**24  # bytes of an existing file that may be a companion


def require_companions(engine: Engine, output: Path | None) -> None:
    """Check that the companions that the engine's settings ask for can be written together with its file.

    Args:
        engine: the engine.
        output: place of the engine's file, or None if none is to be written.

    Raises:
        OptionsError: no file is to be written, so a companion would not be either.
        EngineError: a companion would replace the engine's file, one that a setting names, or a file of another kind.
        FileNotFoundError: the folder around a companion does not exist.
    """
    for companion in engine.companions():
        setting, path = companion.setting, companion.path
        if output is None:
            raise OptionsError(
                f"{setting}={str(path)!r} is written together with the engine's file: give output as well, or leave "
                f"{setting} out"
            )
        for name, other in (("output", output), *_named(engine, setting)):
            if _is_same(path, other):
                raise EngineError(f"{setting} and {name} are the same file, {path}; name another file for {setting}")
        if path.is_dir():
            raise EngineError(f"{setting} is a file, but {path} is a folder; name a file, such as one in it")
        if (folder := missing_folder(path)) is not None:
            raise FileNotFoundError(2, "there is no such folder", str(folder))
        if path.is_file() and not _is_one(companion):
            raise EngineError(
                f"{setting}={str(path)!r} would replace a file of another kind; name a new file, or remove that one"
            )


@contextlib.contextmanager
def with_companions(engine: Engine, model: nn.Module) -> Iterator[None]:
    """Write the companions together with the engine's file; an error in the block leaves all of them unchanged."""
    with contextlib.ExitStack() as places:
        for companion in engine.companions():
            places.enter_context(replacing(companion.path)).write(companion.content(model))
        yield


def _named(engine: Engine, but: str) -> list[tuple[str, Path]]:
    """Return the settings that may name a file, with the file."""
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine) if field.name != but}
    return [(name, Path(value)) for name, value in settings.items() if value and isinstance(value, (str, os.PathLike))]


def _is_same(path: Path, other: Path) -> bool:
    same = os.path.realpath(path) == os.path.realpath(other)
    return same or (path.exists() and other.exists() and path.samefile(other))


def _is_one(companion: Companion) -> bool:
    return companion.path.stat().st_size <= LARGEST and companion.is_one(companion.path.read_bytes())
