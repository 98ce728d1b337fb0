"""What the commands that measure put on offer: flags name the library's functions, the words below them its arguments.

    --low-rank --ranks 8,16 --kinds channels --factor-bits 4 --no-whitened --no-compensated
    prune_quantize() + ranks + ranks.then(prune_quantize(bits=(4,), sparsity=(0,)))  with
    ranks = low_rank(ranks=(8, 16), kinds=("channels",))

There is data wherever something is measured, so factors are whitened and codes compensated unless told otherwise.
What always holds: a word whose function is not on offer is refused, not dropped.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli.arguments import numbers

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import Options
    from qcompress.measuring.offered import Offered

QUANTIZE, RANKS, LAYERS = "Pruning and quantization", "Low rank", "Layers"


def _listed(help: str, panel: str, metavar: str = "NUMBER,…") -> Any:  # noqa: A002  (typer's own name)
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel)


def offered(
    prune_quantize: Annotated[
        bool, typer.Option(help="Offer pruning, then quantization.", rich_help_panel=QUANTIZE)
    ] = True,
    bits: Annotated[str | None, _listed("Bits of a weight, 2 to 16. Default: 2,3,4,6,8.", QUANTIZE)] = None,
    sparsity: Annotated[
        str | None, _listed("Shares of the weights to prune. Default: 0,0.5,0.75; 0 in groups.", QUANTIZE)
    ] = None,
    group_size: Annotated[
        str | None, _listed("Weights of a row that share a scale, as 32,128. Default: whole rows.", QUANTIZE)
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Codes around zero. Default: yes.", rich_help_panel=QUANTIZE),
    ] = None,
    compensated: Annotated[
        bool | None,
        typer.Option(
            "--compensated/--no-compensated",
            help="Let the weights that are kept make up for what is lost, on DATA (in factors too): a fraction of the "
            "loss in the same bytes. The measurement holds a matrix of the square of a layer's inputs. Default: yes.",
            rich_help_panel=QUANTIZE,
        ),
    ] = None,
    low_rank: Annotated[
        bool,
        typer.Option("--low-rank", help="Offer low-rank factors. Every word below implies it.", rich_help_panel=RANKS),
    ] = False,
    ratios: Annotated[
        str | None,
        _listed(
            "Shares of the weights that factors may take. Where no ratios, ranks or energies are given: 0.125 to 0.75.",
            RANKS,
        ),
    ] = None,
    ranks: Annotated[str | None, _listed("Ranks, as 8,16.", RANKS)] = None,
    energies: Annotated[
        str | None, _listed("Shares of a weight's squared norm that its rank keeps, as 0.9,0.99.", RANKS)
    ] = None,
    kinds: Annotated[
        str | None,
        _listed(
            "channels (out × in), spatial (a column, then a row of a kernel), tucker (1×1, kernel, 1×1), "
            "sliced (a rank for each slice of the input channels). Default: channels,spatial.",
            RANKS,
            "KIND,…",
        ),
    ] = None,
    slices: Annotated[str | None, _listed("How many slices, for the kind sliced. Default: 2,4.", RANKS)] = None,
    whitened: Annotated[
        bool | None,
        typer.Option(
            "--whitened/--no-whitened",
            help="Fit the factors to the layers' inputs on DATA. Default: yes.",
            rich_help_panel=RANKS,
        ),
    ] = None,
    factor_bits: Annotated[
        str | None, _listed("Offer the factors quantized too, so that rank and bits are one choice, as 4,8.", RANKS)
    ] = None,
    factor_sparsity: Annotated[
        str | None, _listed("Shares of the factors to prune before they are quantized. Default: 0.", RANKS)
    ] = None,
    skip: Annotated[
        str | None, _listed("Names of layers that stay as they are, as 'lm_head,*.norm*'.", LAYERS, "PATTERN,…")
    ] = None,
    only: Annotated[str | None, _listed("Names of the layers that do not.", LAYERS, "PATTERN,…")] = None,
) -> "Options | Offered":
    """The options on offer.

    Raises:
        typer.BadParameter: words that do not go together, nothing on offer, or values outside their range.
    """
    import qcompress
    from qcompress.errors import OptionsError
    from qcompress.measuring.offered import Offered

    def listed(**words: str | None) -> dict[str, Any]:
        """What is given, by the names of the library's arguments."""
        return {name: numbers(text, _flag(name)) for name, text in words.items() if text is not None}

    simple = listed(bits=bits, sparsity=sparsity, group_size=group_size)
    if symmetric is not None:
        simple["symmetric"] = symmetric
    if simple and not prune_quantize:
        raise typer.BadParameter(f"{_flag(next(iter(simple)))} and --no-prune-quantize do not go together.")
    rank_words: dict[str, Any] = listed(ratios=ratios, ranks=ranks, energies=energies, slices=slices)
    if kinds is not None:
        rank_words["kinds"] = tuple(kind.strip() for kind in kinds.split(","))
    if whitened is not None:
        rank_words["whitened"] = whitened
    if slices is not None and "sliced" not in rank_words.get("kinds", ()):
        raise typer.BadParameter("--slices is for the kind sliced, as --kinds sliced --slices 2,4.")
    coded = listed(factor_bits=factor_bits, factor_sparsity=factor_sparsity)
    if factor_sparsity is not None and factor_bits is None:
        raise typer.BadParameter("--factor-sparsity needs --factor-bits, as --factor-bits 4,8 --factor-sparsity 0,0.5.")
    if compensated is not None and not (prune_quantize or coded):
        raise typer.BadParameter("--compensated is for bits: --no-prune-quantize needs --factor-bits beside it.")
    made_up = compensated is not False
    on_offer = qcompress.Options(())
    try:
        if prune_quantize:
            on_offer += qcompress.prune_quantize(**simple, compensated=made_up)
        if low_rank or rank_words or coded:
            factors = qcompress.low_rank(**rank_words)
            on_offer += factors
            if coded:
                bits_of, sparsity_of = coded["factor_bits"], coded.get("factor_sparsity", (0,))
                coding = qcompress.prune_quantize(bits_of, sparsity_of, compensated=made_up)
                on_offer += factors.then(coding)
    except OptionsError as error:
        raise typer.BadParameter(f"{error}.") from error
    if not on_offer.offers:
        raise typer.BadParameter("no compression options enabled: --no-prune-quantize needs --low-rank.")
    patterns = {
        name: [own.strip() for own in text.split(",")] for name, text in (("skip", skip), ("only", only)) if text
    }
    return Offered.of(on_offer, **patterns) if patterns else on_offer


def offering(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` with the words of `offered` beside its own; it is called with what that gives as ``options``."""
    words = inspect.signature(offered).parameters
    signature = inspect.signature(command)

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        return command(options=offered(**{name: given.pop(name) for name in words}), **given)

    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    run.__signature__ = signature.replace(parameters=[*own, *words.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *words.values())}
    return run


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
