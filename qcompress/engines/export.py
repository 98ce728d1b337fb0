"""`export`: write a compressed model as an engine's own file, completely or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from formulations.files import AnyPath, drafting, missing_folder
from qcompress.compressed.record import record_of, require_unchanged
from qcompress.engines.base import Engine
from qcompress.engines.companions import require_companions, with_companions
from qcompress.engines.registry import as_engine
from qcompress.errors import EngineError, found
from qcompress.model.batches import require_samples
from qcompress.model.modes import outside_modes
from qcompress.model.opened import opened_of


class HasModel(Protocol):
    """Anything that holds a compressed model, such as `qcompress.Result`."""

    @property
    def model(self) -> nn.Module:
        """The model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """The file that `export` wrote, or a folder with the total bytes of its files."""

    path: Path
    size_bytes: int


@outside_modes
def export(
    model_or_result: nn.Module | HasModel, path: AnyPath, *, target: str | Engine, example: Any = None
) -> ExportedFile:
    """Write a model for an engine.

    Args:
        model_or_result: the result of `apply`, `load_compressed` or `compress`; a model that is not compressed is
            written unchanged.
        path: path of the file, which is replaced if it exists, or of the folder, which must be new or empty.
        target: name of an engine (`engines` lists them), or an engine with its settings.
        example: a batch, for engines that trace the model.

    Raises:
        EngineError: the engine is unknown, or does not support the model, a layer or an option; something else stands
            at the path, or where a setting has another file written; or the model does not run on the example.
        DataError: the example holds no sample.
        ArtefactError: a compressed weight has been changed since compression.
        MissingError: a package of the engine is missing.
        OSError: the file cannot be written; no partial file is left.
    """
    engine, model, goal = as_engine(target), model_of(model_or_result), Path(path)
    require_free(engine, goal)
    with with_companions(engine, model), drafting(goal) as draft:
        return ExportedFile(path=goal, size_bytes=draft_file(engine, model, draft, example))


def draft_file(engine: Engine, model: nn.Module, draft: Path, example: Any) -> int:
    """Write only the engine's file, to a temporary place, and return its bytes; raises the errors of `export`.

    Afterwards it is too late to ask: a pipe or device has no size.
    """
    if opened_of(model) is not None and not engine.by_block:
        raise EngineError(f"engine {engine.name!r} does not write a model block by block: load it whole")
    if (record := record_of(model)) is not None and opened_of(model) is None:  # an opened model cannot have changed
        require_unchanged(record, model)
    require_samples(example, "the example")
    engine.write(model, draft, example)
    return size_on_disk(draft)


def require_free(engine: Engine, goal: Path, *, own: bool = False) -> None:
    """Check that an engine's file or folder can be written there, and its companions where its settings say.

    A file replaces a file, a folder an empty folder, and a companion one of its kind.

    Args:
        engine: the engine.
        goal: the place.
        own: whether an existing file or folder is from the same run, so that a folder may be replaced too.

    Raises:
        EngineError: something else exists there.
        FileNotFoundError: the folder around it does not exist.
    """
    require_companions(engine, goal)
    if (folder := missing_folder(goal)) is not None:
        raise FileNotFoundError(2, "there is no such folder", str(folder))
    if why := other_kind(engine, goal):
        raise EngineError(f"{why}; name a {'new folder' if engine.writes_folder else 'file, such as one in it'}")
    if goal.is_dir() and any(goal.iterdir()) and not own:
        raise EngineError(
            f"the folder {goal} is not empty; name a new folder. One is replaced only by 'compress' with the "
            "run folder (--folder) that it was written from, if nothing in it was changed"
        )


def other_kind(engine: Engine, path: Path) -> str:
    """Say that there is a file where the engine writes a folder, or the reverse; else return an empty string."""
    if path.is_dir() if not engine.writes_folder else path.is_file():
        kinds = ("a folder", "a file") if engine.writes_folder else ("a file", "a folder")
        return f"engine {engine.name!r} writes {kinds[0]}, but {path} is {kinds[1]}"
    return ""


def model_of(model_or_result: nn.Module | HasModel) -> nn.Module:
    """Return the model itself.

    Raises:
        EngineError: the argument is neither a module nor holds one.
    """
    model = model_or_result if isinstance(model_or_result, nn.Module) else getattr(model_or_result, "model", None)
    if not isinstance(model, nn.Module):
        raise EngineError(
            f"expected a torch module or the result of compress(), found {found(model_or_result, nn.Module)}"
        )
    return model


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
