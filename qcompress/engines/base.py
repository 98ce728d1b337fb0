"""An engine runs compressed models: it says what it supports, how large its file is, and how to run the file.

The choice is restricted to what the engine runs (`Engine.options`, `Engine.refuse`, `Engine.ties`), under budgets in
bytes of the engine's own file (`Engine.sizes`). Then the file is written (`Engine.write`), run (`Engine.run`) and
compared with the model in PyTorch that the choice was based on (`Engine.emulate`, `Engine.check`).

Invariants: a file takes exactly ``overhead`` plus the bytes of the chosen options, and the weights of the model passed
to `write` are those in its record.
"""

import dataclasses
import importlib.util
import inspect
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qcompress.errors import EngineError, MissingError, OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.model import forward as forwards
from qcompress.model.parts import Part
from qcompress.options import Options
from qcompress.scalars import as_flag, as_whole
from qcompress.transforms.base import Transform

TEXTS = (str, str | None)
"""Types of settings that are texts, such as paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Description of an engine, and whether it can be used here.

    Attributes:
        name: name of the engine.
        summary: what it is, in a line.
        available: whether its packages are installed.
        why_not: what is missing, or an empty string.
        settings: name of a setting → its meaning, with the default.
    """

    name: str
    summary: str
    available: bool
    why_not: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSizes:
    """Size of an engine's file in bytes.

    Attributes:
        options: for every part, the bytes that each of its options takes in the file, padding included.
        overhead: bytes that do not depend on the choice: header, metadata, tensors that are not parts.
        refused: why the model does not allow an option that its engine runs elsewhere, by part and option. Such an
            option has size 0.
        weights: for every part, the bytes of each option's numbers, that is codes, scales and zero points as the file
            holds them; None if these are the bytes that the options have everywhere.
    """

    options: tuple[tuple[int, ...], ...]
    overhead: int
    refused: Mapping[tuple[int, int], str] = field(default_factory=dict)
    weights: tuple[tuple[int, ...], ...] | None = None

    def of(self, choice: Sequence[int]) -> int:
        """Return the bytes of the file for a choice of one option per part.

        Raises:
            EngineError: the model does not allow a chosen option; the message says why.
        """
        if why := next(filter(None, map(self.refused.get, enumerate(choice))), ""):
            raise EngineError(why)
        return self.overhead + sum(sizes[option] for sizes, option in zip(self.options, choice, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineRun:
    """Outputs and time of a run in an engine.

    Attributes:
        outputs: one tensor ``(samples, …)`` per batch.
        wall_s: seconds for all batches, without loading the file.
    """

    outputs: tuple[Tensor, ...]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A small file that a setting of an engine asks for besides the engine's own file.

    Attributes:
        setting: name of the setting.
        path: the file.
        content: ``model -> bytes``, the content for a model that `Engine.write` is given.
        is_one: ``bytes -> bool``, whether the content of an existing file is of this kind, so that it may be replaced.
    """

    setting: str
    path: Path
    content: Callable[[nn.Module], bytes]
    is_one: Callable[[bytes], bool]


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """An inference engine. Subclasses are frozen dataclasses; their fields are settings, which all have defaults."""

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()  # modules it imports to write or run files
    by_block: ClassVar[bool] = False  # whether it writes an opened model with one block in memory at a time
    opens_by_itself: ClassVar[bool] = False  # whether the command line opens hf:FOLDER for it even without --memory
    writes_folder: ClassVar[bool] = False  # whether it writes a folder instead of a file
    extra: ClassVar[str] = ""  # the extra of qcompress that installs the modules
    tolerance: ClassVar[
        float
    ]  # root mean square difference of its outputs from the emulation's, relative to their spread

    @classmethod
    def why_not(cls) -> str:
        """Return why this engine cannot be used (missing packages), or an empty string. Imports nothing."""
        missing = [module for module in cls.requires if importlib.util.find_spec(module.split(".")[0]) is None]
        return (
            f"engine {cls.name!r} needs {', '.join(missing)}: pip install 'qcompress[{cls.extra}]'" if missing else ""
        )

    @classmethod
    def info(cls) -> EngineInfo:
        """Return the engine's description."""
        why_not = cls.why_not()
        meanings = attributes_in(cls.__doc__ or "")
        settings = {
            item.name: f"{meanings.get(item.name, '')} [default: {item.default!r}]".lstrip()
            for item in dataclasses.fields(cls)
        }
        return EngineInfo(name=cls.name, summary=cls.summary, available=not why_not, why_not=why_not, settings=settings)

    @classmethod
    def require(cls) -> None:
        """Raise an error if the engine's packages are missing.

        Raises:
            MissingError: a package is missing; the message says how to install it.
        """
        if why_not := cls.why_not():
            raise MissingError(why_not)

    def configured(self, settings: Mapping[str, Any]) -> "Engine":
        """Return the engine with changed settings.

        Raises:
            EngineError: the engine does not have a setting; the message lists its settings.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if unknown := [name for name in settings if name not in known]:
            has = ", ".join(f"{name} (now {value!r})" for name, value in known.items()) or "none"
            raise EngineError(f"engine {self.name!r} has no setting {', '.join(map(repr, unknown))}; it has: {has}")
        return dataclasses.replace(self, **settings)

    def require_settings(self) -> None:
        """Check that every setting has a value of its kind; whole numbers are from 0, texts may be paths.

        Raises:
            OptionsError: names one that does not.
        """
        for item in dataclasses.fields(self):
            value, name = getattr(self, item.name), f"{item.name} of engine {self.name!r}"
            if value is item.default:
                continue
            if item.type is bool:
                as_flag(value, name)
            elif item.type is int:
                as_whole(value, name, least=0)
            elif item.type in TEXTS and not isinstance(value, (str, os.PathLike)):
                raise OptionsError(f"{name} must be a text, found {value!r}")

    @abstractmethod
    def options(self) -> Options:
        """Return everything the engine runs; offered by default."""

    @abstractmethod
    def refuse(self, part: Part, transform: Transform) -> str:
        """Return why the engine cannot run a part stored with a transform, or an empty string. `Keep` is always legal.

        The reason does not name the part: it is stated with all the parts that it holds for.
        """

    def refuse_in(self, model: nn.Module, parts: Sequence[Part]) -> Mapping[str, str]:  # noqa: ARG002
        """Names of parts that the engine cannot run compressed in this model → why; by default none."""
        return {}

    def ties(self, parts: Sequence[Part]) -> list[tuple[str, ...]]:  # noqa: ARG002
        """Return the names of parts that must take the same option, for `formulations.reductions.tie.tie`."""
        return []

    @abstractmethod
    def sizes(
        self, model: nn.Module, parts: Sequence[Part], transforms: Sequence[Sequence[Transform]], example: Any = None
    ) -> FileSizes:
        """Return the size of the file of ``model``, to the byte, for every option of every part.

        Args:
            model: the model, compressed or not; its shapes, names and metadata are used.
            parts: parts of the model.
            transforms: the options of each part.
            example: a batch, for engines that trace the model.

        Raises:
            EngineError: the engine does not support this model; the message says why.
        """

    @abstractmethod
    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:
        """Write ``model`` according to its record (or unchanged if it has none) to ``path``, which must not exist.

        Nothing is written elsewhere: also models that are only to be timed are written (see `companions`).

        Raises:
            EngineError: the engine does not support this model; the message says why.
        """

    def companions(self) -> Sequence[Companion]:
        """Return the files that the settings ask for besides the engine's own, see `qcompress.engines.companions`."""
        return ()

    def example_of(self, path: Path, batch: Any) -> Any:  # noqa: ARG002
        """Return a batch in the form of the example of a written file, for which `sizes` predicts the file's bytes.

        The default is the batch itself, for engines that do not trace the model.

        Raises:
            BatchError: the batch lacks something of the example.
        """
        return batch

    @abstractmethod
    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Run the file in the engine."""

    def run_by_block(self, path: Path, batches: Iterable[Any]) -> EngineRun:  # noqa: ARG002
        """Run the file of an opened model, with one block of weights in memory at a time if possible.

        Raises:
            EngineError: the engine does not write opened models.
        """
        raise EngineError(f"engine {self.name!r} does not run a model block by block: load it whole")

    def rounding(
        self,
        model: nn.Module,  # noqa: ARG002
        choice: Iterable[tuple[Part, Transform]] | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Return a context in which the model rounds what the engine rounds besides the weights; by default nothing.

        Args:
            model: a compressed model, or a model with the dense weights of a choice.
            choice: the choice, if the model has no record of it.
        """
        return nullcontext()

    def emulate(self, model: nn.Module, batches: Iterable[Any]) -> EngineRun:
        """Compute what `run` is expected to give: the model's outputs with the engine's `rounding`."""
        with self.rounding(model):
            return timed(forwards.run(model, batch) for batch in batches)

    def why_not_timed(self) -> str:
        """Return why options cannot be timed in the engine, or an empty string."""
        return (
            f"engine {self.name!r} does not time options: a budget for latency_s needs target 'onnxruntime', or no "
            "target (PyTorch)"
        )

    def time_options(
        self,
        model: nn.Module,  # noqa: ARG002
        measurement: Measurement,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        on_progress: Callable[[TimingProgress], None] | None = None,  # noqa: ARG002
    ) -> Measurement:
        """Return a measurement with ``latency_s``, the seconds of every option in the engine.

        Args:
            model: the model that was measured.
            measurement: its measurement, with only options that the engine runs (see
                `qcompress.engines.legal.for_engine`).
            batch: one batch, with the size and length of those in production.
            on_progress: called after every group of equal layers.

        Raises:
            EngineError: the engine does not time options.
        """
        raise EngineError(self.why_not_timed())

    def seconds_of(
        self,
        model: nn.Module,  # noqa: ARG002
        measurement: Measurement,  # noqa: ARG002
        choices: Sequence[Sequence[int]],  # noqa: ARG002
        batch: Any,  # noqa: ARG002
    ) -> list[float]:
        """Return the seconds of the whole model with each choice, in the unit of the measurement by `time_options`.

        Raises:
            EngineError: the engine does not time options.
        """
        raise EngineError(self.why_not_timed())

    def seconds(self, paths: Sequence[Path], batches: Sequence[Any]) -> list[float]:
        """Return the seconds that each of several files takes for all the batches."""
        return [self.run(path, batches).wall_s for path in paths]

    def peak_bytes(self, path: Path, batch: Any) -> int | None:  # noqa: ARG002
        """Return the peak memory of loading the file and running a batch, or None if it is not measured."""
        return None

    def check(self, path: Path, model: nn.Module) -> str:  # noqa: ARG002
        """Return how the file's weights differ from the model's, or an empty string; the default does not check."""
        return ""


def attributes_in(docstring: str) -> dict[str, str]:
    r"""Return the descriptions of the section "Attributes" of a docstring, by name.

    >>> attributes_in("An engine.\n\nAttributes:\n    threads: number of threads;\n        0 for all cores.\n")
    {'threads': 'number of threads; 0 for all cores.'}
    """
    section = inspect.cleandoc(docstring).partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}


def timed(outputs: Iterator[Tensor]) -> EngineRun:
    """Compute all outputs, without gradients, and measure the time.

    >>> run = timed(iter([torch.zeros(2)]))
    >>> len(run.outputs), run.wall_s >= 0
    (1, True)
    """
    start = time.perf_counter()
    with torch.no_grad():
        drawn = tuple(outputs)
    return EngineRun(outputs=drawn, wall_s=time.perf_counter() - start)
