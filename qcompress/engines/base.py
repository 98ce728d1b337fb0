"""An engine is what runs a compressed model: a value that says what it takes, how large its file is, and how it runs.

The choice is searched among what the engine runs (`Engine.options`, `Engine.refuse`, `Engine.ties`), under budgets in
its own file's bytes (`Engine.sizes`); then it is written (`Engine.write`), run (`Engine.run`) and compared with the
model that stood for it while it was chosen (`Engine.emulate`, `Engine.check`).

What always holds: a file takes exactly ``overhead`` plus the bytes of the chosen options, and what `write` is given is
a model whose weights are what its record says.
"""

import dataclasses
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qcompress.errors import EngineError, MissingError
from qcompress.measurement import Measurement
from qcompress.measuring.latency import TimingProgress
from qcompress.model import forward as forwards
from qcompress.model.parts import Part
from qcompress.options import Options
from qcompress.transforms.base import Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is, and whether it can be used here."""

    name: str
    summary: str
    available: bool
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSizes:
    """How an engine's file comes out, in bytes.

    Attributes:
        options: of every part, the bytes that each of its options takes in the file, padding included.
        overhead: everything that no choice changes: header, metadata, tensors that are no part.
    """

    options: tuple[tuple[int, ...], ...]
    overhead: int

    def of(self, choice: Sequence[int]) -> int:
        """Bytes of the file with one option a part."""
        return self.overhead + sum(sizes[option] for sizes, option in zip(self.options, choice, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineRun:
    """What an engine gave for some batches.

    Attributes:
        outputs: one tensor ``(samples, …)`` a batch.
        wall_s: seconds for all of them, without loading the file.
    """

    outputs: tuple[Tensor, ...]
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """One engine. Subclasses are frozen dataclasses; their fields are their settings and all have defaults."""

    name: ClassVar[str]
    summary: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()  # modules it imports when it writes or runs
    by_block: ClassVar[bool] = False  # whether it writes and runs an opened model with one block in memory at a time
    extra: ClassVar[str] = ""  # the extra of qcompress that brings them
    tolerance: ClassVar[
        float
    ]  # root mean square difference of its outputs from the emulation's, relative to their spread

    @classmethod
    def why_not(cls) -> str:
        """What is missing to use this engine, or an empty string. Imports nothing."""
        missing = [module for module in cls.requires if importlib.util.find_spec(module.split(".")[0]) is None]
        return (
            f"engine {cls.name!r} needs {', '.join(missing)}: pip install 'qcompress[{cls.extra}]'" if missing else ""
        )

    @classmethod
    def info(cls) -> EngineInfo:
        """The engine's description."""
        why_not = cls.why_not()
        return EngineInfo(name=cls.name, summary=cls.summary, available=not why_not, why_not=why_not)

    @classmethod
    def require(cls) -> None:
        """Refuse to go on without the engine's packages.

        Raises:
            MissingError: one is missing; says how to install it.
        """
        if why_not := cls.why_not():
            raise MissingError(why_not)

    def configured(self, settings: Mapping[str, Any]) -> "Engine":
        """The engine with some settings set anew.

        Raises:
            EngineError: a setting it does not have; lists the ones it has.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if unknown := [name for name in settings if name not in known]:
            has = ", ".join(f"{name} (now {value!r})" for name, value in known.items()) or "none"
            raise EngineError(f"engine {self.name!r} has no setting {', '.join(map(repr, unknown))}; it has: {has}")
        return dataclasses.replace(self, **settings)

    @abstractmethod
    def options(self) -> Options:
        """Everything the engine runs, which is what is searched where nothing else is asked for."""

    @abstractmethod
    def refuse(self, part: Part, transform: Transform) -> str:
        """Why the engine cannot run a part that is stored so, or an empty string. Keeping a part is always legal."""

    def ties(self, parts: Sequence[Part]) -> list[tuple[str, ...]]:  # noqa: ARG002
        """Names of parts that must take the same option, for `formulations.reductions.tie.tie`."""
        return []

    @abstractmethod
    def sizes(
        self, model: nn.Module, parts: Sequence[Part], transforms: Sequence[Sequence[Transform]], example: Any = None
    ) -> FileSizes:
        """How large the file of ``model`` comes out, to the byte, for every option of every part.

        Args:
            model: compressed or not; shapes, names and metadata are taken from it.
            parts: of it.
            transforms: the options of each part.
            example: a batch, for engines that trace the model.

        Raises:
            EngineError: the engine cannot take this model; says what and why.
        """

    @abstractmethod
    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:
        """Write ``model`` as its record says (a model without one as it is) to ``path``, which is not there yet.

        Raises:
            EngineError: the engine cannot take this model; says what and why.
        """

    @abstractmethod
    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Run the file in the engine."""

    def run_by_block(self, path: Path, batches: Iterable[Any]) -> EngineRun:  # noqa: ARG002
        """Run the file with a block's weights in memory at a time.

        Raises:
            EngineError: the engine only runs it whole.
        """
        raise EngineError(f"engine {self.name!r} does not run a model block by block: load it whole")

    def emulate(self, model: nn.Module, batches: Iterable[Any]) -> EngineRun:
        """What `run` should give: by default the model's outputs."""
        return timed(forwards.run(model, batch) for batch in batches)

    def why_not_timed(self) -> str:
        """Why options cannot be timed in the engine, or an empty string."""
        return (
            f"engine {self.name!r} does not time options: a budget for latency_s is for target 'onnxruntime', or for "
            "none (PyTorch)"
        )

    def time_options(
        self,
        model: nn.Module,  # noqa: ARG002
        measurement: Measurement,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        on_progress: Callable[[TimingProgress], None] | None = None,  # noqa: ARG002
    ) -> Measurement:
        """A measurement of what the engine runs with ``latency_s``, the seconds of every option in the engine.

        Args:
            model: that was measured.
            measurement: of it, with only options that the engine runs (see `qcompress.engines.legal.for_engine`).
            batch: one batch, of the size and length that it will be in use.
            on_progress: called after every layer and those like it.

        Raises:
            EngineError: the engine does not time options.
        """
        raise EngineError(self.why_not_timed())

    def seconds(self, paths: Sequence[Path], batches: Sequence[Any]) -> list[float]:
        """Seconds that each of some files takes for all the batches."""
        return [self.run(path, batches).wall_s for path in paths]

    def peak_bytes(self, path: Path, batch: Any) -> int | None:  # noqa: ARG002
        """The most memory that loading the file and running a batch takes, or None where that is not measured."""
        return None

    def check(self, path: Path, model: nn.Module) -> str:  # noqa: ARG002
        """What the file's weights differ in from the model's, or an empty string; by default nothing is looked at."""
        return ""


def timed(outputs: Iterator[Tensor]) -> EngineRun:
    """Draw all outputs, without gradients, and note the seconds.

    >>> run = timed(iter([torch.zeros(2)]))
    >>> len(run.outputs), run.wall_s >= 0
    (1, True)
    """
    start = time.perf_counter()
    with torch.no_grad():
        drawn = tuple(outputs)
    return EngineRun(outputs=drawn, wall_s=time.perf_counter() - start)
