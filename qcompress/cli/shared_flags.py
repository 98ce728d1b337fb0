"""Groups of flags that name the arguments of the library's functions, each with ``arguments()`` that gives those."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import arguments

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn

    from qcompress import Engine
    from qcompress.model.text import Windows

TRAINING, ENGINE, TEXT = "Fine-tuning", "Engine", "Language models (MODEL hf:FOLDER)"
HF = "hf:"


@dataclass(frozen=True, kw_only=True)
class CalibrationFlags:
    """The model, the data, and how the loss between two outputs is taken."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:callable that returns the original model, or hf:FOLDER, a language model's folder.",
        ),
    ]
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="package.module:callable that returns the calibration batches. For hf:FOLDER give --text instead.",
        ),
    ] = None
    loss: arguments.Loss = "kl"
    forward: arguments.Forward = None
    seed: arguments.Seed = 0

    def arguments(self) -> dict[str, Any]:
        """``loss``, ``forward`` and ``seed``; the callables are imported here."""
        return {
            "loss": arguments.loss(self.loss),
            "forward": arguments.forward(self.forward),
            "seed": self.seed,
        }

    def model_and_data(self) -> tuple[Any, Any]:
        """The model and the batches; both names are checked before either callable runs.

        Raises:
            typer.BadParameter: a name that stands for none, or no data.
        """
        if self.data is None:
            raise typer.BadParameter(f"{self.model!r} needs DATA, package.module:callable that returns batches.")
        make_model, make_data = arguments.function(self.model, "MODEL"), arguments.function(self.data, "DATA")
        return make_model(), make_data()


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """The text that a language model is calibrated on, and the memory that it may take."""

    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plain text that windows of tokens are taken from.", rich_help_panel=TEXT),
    ] = None
    windows: Annotated[
        int,
        typer.Option(
            help="Windows to calibrate on, spread evenly over the text; a quarter as many check choices, and as many "
            "judge the result.",
            min=4,
            rich_help_panel=TEXT,
        ),
    ] = 64
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2, rich_help_panel=TEXT)] = 512
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="The most memory that measuring may take, as 4GB; the model is read block by block.",
            rich_help_panel=TEXT,
        ),
    ] = None

    def opened(self, model: str, data: str | None) -> "tuple[nn.Module, Windows] | None":
        """The opened model of ``hf:FOLDER`` and the windows of the text; None for any other MODEL.

        Raises:
            typer.BadParameter: words that do not go together.
        """
        if not model.startswith(HF):
            if self.text is not None or self.memory is not None:
                raise typer.BadParameter("--text and --memory are for MODEL hf:FOLDER.")
            return None
        if self.text is None or data is not None:
            raise typer.BadParameter(f"{model!r} takes its data from --text FILE, without DATA.")
        import qcompress
        from qcompress.model.text import token_windows

        folder = model.removeprefix(HF)
        windows = token_windows(folder, self.text, length=self.length, count=self.windows)
        return qcompress.open_model(folder), windows


@dataclass(frozen=True, kw_only=True)
class MeasureFlags:
    """How costs are measured, and for how large parts."""

    method: arguments.Method = "fisher"
    granularity: arguments.Granularity = "layer"
    jobs: Annotated[int, typer.Option(help="Processes that measure, a batch at a time; -1 for one a core.")] = 1

    def arguments(self) -> dict[str, Any]:
        """``method``, ``granularity`` and ``jobs``."""
        return {"method": self.method, "granularity": arguments.granularity(self.granularity), "jobs": self.jobs}


@dataclass(frozen=True, kw_only=True)
class ChoiceFlags:
    """What the choice must satisfy, and how it is made."""

    budget: arguments.Budgets
    minimize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Minimize this resource, with a predicted loss of at most the one in --budget loss=0.02.",
        ),
    ] = None
    solver: arguments.SolverName = "auto"
    time_limit: arguments.TimeLimit = 60.0
    pairs: arguments.Pairs = True
    validation: Annotated[
        str | None,
        typer.Option(
            metavar=arguments.CALLABLE,
            help="Held-out batches to check choices on. Default: a quarter of the samples of DATA.",
        ),
    ] = None
    guard: Annotated[
        bool, typer.Option(help="Try several choices on the held-out samples and take the best of them.")
    ] = True
    refine_rounds: Annotated[
        int,
        typer.Option(
            help="Maximum number of rounds that measure again around the choice and choose again by true loss; each "
            "takes about as long as the first measurement.",
            min=0,
        ),
    ] = 0

    def arguments(self) -> dict[str, Any]:
        """The arguments of `qcompress.compress` of the same names."""
        validation = None if self.validation is None else arguments.function(self.validation, "--validation")()
        return {
            "budget": arguments.budgets(self.budget),
            "minimize": self.minimize,
            "solver": self.solver,
            "time_limit": self.time_limit,
            "pairs": self.pairs,
            "validation": validation,
            "guard": self.guard,
            "refine_rounds": self.refine_rounds,
        }


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Fine-tuning after the choice."""

    finetune_steps: Annotated[
        int,
        typer.Option(
            help="Maximum number of training steps on DATA after the choice, with the original as teacher; training "
            "ends early when the loss stops falling. The size stays the same.",
            min=0,
            rich_help_panel=TRAINING,
        ),
    ] = 0
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: 3e-4.", rich_help_panel=TRAINING)
    ] = None

    def arguments(self) -> dict[str, Any]:
        """``finetune_steps`` and ``learning_rate``.

        Raises:
            typer.BadParameter: a learning rate without steps.
        """
        if self.learning_rate is None:
            return {"finetune_steps": self.finetune_steps}
        if not self.finetune_steps:
            raise typer.BadParameter(
                "--learning-rate needs --finetune-steps, for example --finetune-steps 1000 --learning-rate 1e-3."
            )
        return {"finetune_steps": self.finetune_steps, "learning_rate": self.learning_rate}


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """The engine to compress for."""

    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Engine to compress for: only encodings that it runs are enabled, file_bytes=… is a budget for its "
            "file, and --output is that file. 'qcompress engines' lists them.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A setting of the engine. May be given several times.", rich_help_panel=ENGINE
        ),
    ] = None

    def engine(self) -> "Engine | None":
        """The engine with its settings.

        Raises:
            typer.BadParameter: settings without an engine.
        """
        if self.target is not None:
            return engine_of(self.target, self.setting)
        if self.setting:
            raise typer.BadParameter("--setting needs --target, for example --target llama.cpp --setting threads=2.")
        return None


def engine_of(target: str, settings: list[str] | None) -> "Engine":
    """The engine called ``target`` with ``NAME=VALUE`` settings."""
    from qcompress.engines.registry import as_engine

    return as_engine(target, **arguments.assignments(settings or [], "--setting"))
