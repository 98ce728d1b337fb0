"""Groups of flags shared by commands; ``arguments()`` returns them as arguments of the library's functions."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import arguments
from qcompress.cli.language_model import TEXT

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn

    from qcompress import Engine

TRAINING, ENGINE = "Fine-tuning", "Engine"
SETTING = "A setting of the engine, listed by 'qcompress engines'. May be given several times."

OriginalModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:callable that returns the original model; for a language model hf:FOLDER or gguf:FILE.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class CalibrationFlags:
    """The model, the data, and the loss between two outputs."""

    model: OriginalModel
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="package.module:callable that returns the calibration batches. Language models take --text instead.",
        ),
    ] = None
    loss: arguments.Loss = "kl"
    forward: arguments.Forward = None
    seed: arguments.Seed = 0

    def arguments(self) -> dict[str, Any]:
        """Return ``loss``, ``forward`` and ``seed``; this imports the callables."""
        return {
            "loss": arguments.loss(self.loss),
            "forward": arguments.forward(self.forward),
            "seed": self.seed,
        }

    def model_and_data(self) -> tuple[Any, Any]:
        """Return the model and the batches; both names are checked before either callable runs.

        Raises:
            typer.BadParameter: a name does not stand for a callable, or there is no data.
        """
        if self.data is None:
            raise typer.BadParameter(f"{self.model!r} needs DATA, package.module:callable that returns batches.")
        make_model, make_data = arguments.function(self.model, "MODEL"), arguments.function(self.data, "DATA")
        return make_model(), make_data()


@dataclass(frozen=True, kw_only=True)
class MeasureFlags:
    """How costs are measured, and the size of parts."""

    method: arguments.Method = None
    granularity: arguments.Granularity = "layer"
    jobs: Annotated[
        int, typer.Option(help="Number of processes that measure, one batch at a time; -1 for one per core.")
    ] = 1

    def arguments(self) -> dict[str, Any]:
        """Return ``granularity`` and ``jobs``, and ``method`` if it is given."""
        method = {} if self.method is None else {"method": self.method}
        return {**method, "granularity": arguments.granularity(self.granularity), "jobs": self.jobs}


@dataclass(frozen=True, kw_only=True)
class ChoiceFlags:
    """Constraints on the choice, and how it is made."""

    budget: arguments.Budgets
    minimize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Minimize this resource subject to a limit on the predicted loss, given as --budget loss=0.02.",
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens that --budget memory=… has to hold keys and values for, beside the engine's file.",
            min=1,
            rich_help_panel=TEXT,
        ),
    ] = None
    solver: arguments.SolverName = "auto"
    time_limit: arguments.TimeLimit = 60.0
    pairs: arguments.Pairs = True
    validation: Annotated[
        str | None,
        typer.Option(
            metavar=arguments.CALLABLE,
            help="Held-out batches for checking choices. Default: a quarter of the samples of DATA.",
        ),
    ] = None
    guard: Annotated[bool, typer.Option(help="Evaluate several choices on the held-out samples and take the best.")] = (
        True
    )
    rounds: Annotated[
        int,
        typer.Option(
            help="Number of rounds in which channels are removed: the network is fitted and measured again in between, "
            "and the result of one round is taken if it loses less on the held-out samples.",
            min=1,
        ),
    ] = 1
    refine_rounds: Annotated[
        int,
        typer.Option(
            help="Maximum number of rounds that measure again around the choice and improve it by true loss; each "
            "takes about as long as the first measurement.",
            min=0,
        ),
    ] = 0

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `qcompress.compress` with the same names."""
        validation = None if self.validation is None else arguments.function(self.validation, "--validation")()
        return {
            "budget": arguments.budgets(self.budget),
            "minimize": self.minimize,
            "solver": self.solver,
            "time_limit": self.time_limit,
            "pairs": self.pairs,
            "validation": validation,
            "guard": self.guard,
            "rounds": self.rounds,
            "refine_rounds": self.refine_rounds,
        }

    def require_context(self, target: str | None) -> None:
        """Check that a budget for memory comes with what it needs.

        Raises:
            typer.BadParameter: it does not; or there is a context without such a budget.
        """
        names = [word.partition("=")[0] for word in self.budget]
        if "memory" not in names:
            if self.context is not None:
                raise typer.BadParameter("--context needs a budget for memory, for example --budget memory=2GB.")
            return
        if self.context is None or target is None:
            raise typer.BadParameter(
                "--budget memory=… needs --context and --target, for example --context 4096 --target llama.cpp."
            )
        if "file_bytes" in names:
            raise typer.BadParameter("--budget memory=… is a limit for file_bytes: give only one of them.")

    def within_memory(self, budget: dict[str, Any], model: "nn.Module") -> dict[str, Any]:
        """Return the budget with one for the engine's file in place of one for memory."""
        from qcompress import memory_budget

        others = dict(budget)
        amount = others.pop("memory", None)
        if amount is None or self.context is None:
            return others
        return {**others, **memory_budget(model, amount, context=self.context)}


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
        """Return ``finetune_steps`` and ``learning_rate``.

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
            help="Engine to compress for: only encodings that it runs are enabled, --budget file_bytes=… limits the "
            "size of its file, and --output is the path of this file. 'qcompress engines' lists the engines.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help=SETTING, rich_help_panel=ENGINE),
    ] = None

    def engine(self) -> "Engine | None":
        """Return the engine with its settings.

        Raises:
            typer.BadParameter: settings without an engine.
        """
        if self.target is not None:
            return engine_of(self.target, self.setting)
        if self.setting:
            raise typer.BadParameter("--setting needs --target, for example --target llama.cpp --setting threads=2.")
        return None


def engine_of(target: str, settings: list[str] | None) -> "Engine":
    """Return the engine called ``target`` with ``NAME=VALUE`` settings, of which texts are taken as written."""
    from qcompress.engines.base import TEXTS
    from qcompress.engines.registry import as_engine

    engine, values = as_engine(target), arguments.assignments(settings or [], "--setting")
    texts = {item.name for item in fields(engine) if item.type in TEXTS}
    for name, _, text in (word.partition("=") for word in settings or []):
        if name in texts and values[name] is not None:
            values[name] = text
    return as_engine(engine, **values)
