"""Flags that enable compression options, named like the library's functions and their arguments.

    --low-rank --ranks 8,16 --kinds channels --factor-bits 4 --no-whitened --no-compensated
    prune_quantize() + ranks + ranks.then(prune_quantize(bits=(4,), sparsity=(0,)))  with
    ranks = low_rank(ranks=(8, 16), kinds=("channels",), whitened=False)

Measuring always has calibration data, so by default factors are whitened and codes compensated. A flag that would have
no effect is an error, never ignored.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli.arguments import numbers

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import Options

QUANTIZE, RANKS, CHANNELS, LAYERS = "Pruning and quantization", "Low rank", "Channels", "Layers"
LOW_RANK_NUMBERS = ("ratios", "ranks", "energies", "slices")
QUANTIZE_NUMBERS = ("bits", "sparsity", "group_size")


def _list_option(help: str, panel: str, metavar: str = "NUMBER,…") -> Any:  # noqa: A002  (name in typer)
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel)


@dataclass(frozen=True, kw_only=True)
class OfferFlags:
    """The compression options to choose from, and the layers to compress."""

    prune_quantize: Annotated[
        bool, typer.Option(help="Enable pruning followed by quantization.", rich_help_panel=QUANTIZE)
    ] = True
    bits: Annotated[str | None, _list_option("Bits per weight, 2 to 16. Default: 2,3,4,6,8.", QUANTIZE)] = None
    sparsity: Annotated[
        str | None, _list_option("Fractions of the weights to prune. Default: 0,0.5,0.75; with groups 0.", QUANTIZE)
    ] = None
    group_size: Annotated[
        str | None, _list_option("Weights per scale, such as 32,128. Default: one scale per row.", QUANTIZE)
    ] = None
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Codes symmetric around zero, or with zero points. Default: symmetric.",
            rich_help_panel=QUANTIZE,
        ),
    ] = None
    compensated: Annotated[
        bool | None,
        typer.Option(
            "--compensated/--no-compensated",
            help="Choose codes so that later ones compensate the errors of earlier ones on DATA (also in factors): "
            "lower loss at the same size. Stores an (inputs x inputs) matrix per layer. Default: on.",
            rich_help_panel=QUANTIZE,
        ),
    ] = None
    low_rank: Annotated[
        bool,
        typer.Option(
            "--low-rank", help="Enable low-rank factors. Any other flag in this panel also enables them.",
            rich_help_panel=RANKS,
        ),
    ] = False  # fmt: skip
    ratios: Annotated[
        str | None,
        _list_option(
            "Sizes of the factors as fractions of the number of weights. Default without --ranks and --energies: 0.125 "
            "to 0.75.",
            RANKS,
        ),
    ] = None
    ranks: Annotated[str | None, _list_option("Ranks, such as 8,16.", RANKS)] = None
    energies: Annotated[
        str | None,
        _list_option("Fractions of a weight's squared norm to retain, such as 0.9,0.99.", RANKS),
    ] = None
    kinds: Annotated[
        str | None,
        _list_option(
            "channels (out × in), spatial (a column, then a row of a kernel), tucker (1×1, kernel, 1×1), "
            "sliced (one rank per slice of the input channels). Default: channels,spatial.",
            RANKS,
            "KIND,…",
        ),
    ] = None
    slices: Annotated[str | None, _list_option("Numbers of slices for the kind 'sliced'. Default: 2,4.", RANKS)] = None
    whitened: Annotated[
        bool | None,
        typer.Option(
            "--whitened/--no-whitened",
            help="Fit the factors to the layers' inputs on DATA. Default: on.",
            rich_help_panel=RANKS,
        ),
    ] = None
    factor_bits: Annotated[
        str | None,
        _list_option("Also offer factors with these bits, such as 4,8; rank and bits are then one choice.", RANKS),
    ] = None
    factor_sparsity: Annotated[
        str | None, _list_option("Fractions of the factors to prune before quantizing them. Default: 0.", RANKS)
    ] = None
    channels: Annotated[
        bool,
        typer.Option(
            "--channels",
            help="Remove channels and heads, with everything that belongs to them: the result is a smaller network. "
            "With --bits or --sparsity, and --low-rank, all in one choice.",
            rich_help_panel=CHANNELS,
        ),
    ] = False
    keep: Annotated[
        str | None,
        _list_option("Fractions of the channels to keep. Default: 0.125 to 0.875. Enables --channels.", CHANNELS),
    ] = None
    channel_block: Annotated[
        int | None,
        typer.Option(
            help="Keep a multiple of this many channels. Enables --channels.",
            rich_help_panel=CHANNELS,
        ),
    ] = None
    skip: Annotated[
        str | None, _list_option("Layers to leave unchanged, such as `lm_head,*.norm*`.", LAYERS, "PATTERN,…")
    ] = None
    only: Annotated[str | None, _list_option("Leave all other layers unchanged.", LAYERS, "PATTERN,…")] = None

    def arguments(self) -> dict[str, Any]:
        """Return ``skip`` and ``only`` for the library's functions."""
        return {
            name: [pattern.strip() for pattern in text.split(",")]
            for name, text in (("skip", self.skip), ("only", self.only))
            if text
        }

    def are_default(self) -> bool:
        """Whether no flag enables, disables or configures an option."""
        return self == OfferFlags(skip=self.skip, only=self.only)

    def options(self) -> "Options":
        """Return the enabled options.

        Raises:
            typer.BadParameter: flags contradict each other, no option is enabled, or a value is outside its range.
        """
        import qcompress
        from qcompress.errors import OptionsError

        quantizing, factoring, coding = self._quantizing(), self._factoring(), self._coding()
        removing = self.channels or self.keep is not None or self.channel_block is not None
        self._require_consistent(quantizing, factoring, coding, removing=removing)
        compensated = self.compensated is not False
        try:
            enabled = qcompress.prune_channels(**self._removing()) if removing else qcompress.Options(())
            if quantizing or (self.prune_quantize and not removing):
                enabled += qcompress.prune_quantize(**quantizing, compensated=compensated)
            if self.low_rank or factoring or coding:
                factors = qcompress.low_rank(**factoring)
                enabled += factors
                if coding:
                    enabled += factors.then(qcompress.prune_quantize(**coding, compensated=compensated))
        except OptionsError as error:
            raise typer.BadParameter(f"{error}.") from error
        return enabled

    def _removing(self) -> dict[str, Any]:
        """Return the given arguments of `prune_channels`."""
        return self._numbers(("keep",)) | ({} if self.channel_block is None else {"granularity": self.channel_block})

    def _quantizing(self) -> dict[str, Any]:
        """Return the given arguments of `prune_quantize`."""
        return self._numbers(QUANTIZE_NUMBERS) | self._switches("symmetric")

    def _factoring(self) -> dict[str, Any]:
        """Return the given arguments of `low_rank`."""
        kinds = {} if self.kinds is None else {"kinds": tuple(kind.strip() for kind in self.kinds.split(","))}
        return self._numbers(LOW_RANK_NUMBERS) | kinds | self._switches("whitened")

    def _coding(self) -> dict[str, Any]:
        """Return the arguments of `prune_quantize` for factors; empty unless ``--factor-bits`` is given."""
        given = self._numbers(("factor_bits", "factor_sparsity"))
        if "factor_sparsity" in given and "factor_bits" not in given:
            raise typer.BadParameter(
                "--factor-sparsity needs --factor-bits, for example --factor-bits 4,8 --factor-sparsity 0,0.5."
            )
        return given and {"bits": given["factor_bits"], "sparsity": given.get("factor_sparsity", (0,))}

    def _require_consistent(self, quantizing: Any, factoring: Any, coding: Any, *, removing: bool) -> None:
        if quantizing and not self.prune_quantize:
            raise typer.BadParameter(f"{_flag(next(iter(quantizing)))} has no effect with --no-prune-quantize.")
        if self.slices is not None and "sliced" not in factoring.get("kinds", ()):
            raise typer.BadParameter("--slices needs the kind sliced, for example --kinds sliced --slices 2,4.")
        if removing:
            if not quantizing and self.compensated is not None and not coding:
                raise typer.BadParameter("with --channels, --compensated needs --bits, --sparsity or --factor-bits.")
            if not quantizing and not self.prune_quantize and not (self.low_rank or factoring or coding):
                raise typer.BadParameter("with --channels, codes are on offer only if --bits or --sparsity is given.")
            return
        if self.compensated is not None and not (self.prune_quantize or coding):
            raise typer.BadParameter(
                "--compensated has no effect with --no-prune-quantize unless --factor-bits is given."
            )
        if not (self.prune_quantize or self.low_rank or factoring or coding):
            raise typer.BadParameter("no compression options enabled: --no-prune-quantize needs --low-rank.")

    def _numbers(self, names: tuple[str, ...]) -> dict[str, Any]:
        texts = {name: getattr(self, name) for name in names}
        return {name: numbers(text, _flag(name)) for name, text in texts.items() if text is not None}

    def _switches(self, *names: str) -> dict[str, bool]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
