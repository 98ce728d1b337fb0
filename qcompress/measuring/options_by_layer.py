"""Select the options on offer for each layer.

Layers are selected by patterns like those of file names (`fnmatch`): ``"encoder.*.attention.*"``, ``"head"``. A pattern
that matches no layer is an error, because it is usually a typing mistake.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qcompress.errors import OptionsError
from qcompress.identity import Identity
from qcompress.model.parts import Part
from qcompress.options import Options
from qcompress.transforms import column_blocks
from qcompress.transforms.own_code import code_of

SHOWN = 20  # layer names listed in an error
_LEFT_OUT, _UNMATCHED = "left out by ", "no pattern of the options matches its name"


@dataclass(frozen=True, slots=True)
class Offered:
    """Options by layer.

    Args:
        by_pattern: options for the layers that a pattern matches; the first match counts.
        skip: patterns of layers that are not compressed.
        only: patterns of the only layers to compress, or None for all.

    >>> from qcompress.options import prune_quantize
    >>> offered = Offered.of({"head": prune_quantize(bits=(8,)), "*": prune_quantize(bits=(2, 4))}, skip="stem")
    >>> offered.left_out("stem"), offered.options("head")
    ("left out by skip='stem'", Options(8 bits; 8 bits, 50 % sparse; 8 bits, 75 % sparse))
    """

    by_pattern: dict[str, Options]
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    @classmethod
    def of(cls, options: Any, *, skip: Any = (), only: Any = None) -> "Offered":
        """Convert the arguments of `qcompress.measure`; for an `Offered`, the patterns are added to its own.

        Raises:
            OptionsError: there are no options, or a pattern is not a string.
        """
        if isinstance(options, Offered):
            both = (
                None
                if only is None and options.only is None
                else (*(options.only or ()), *_patterns(only or (), "only"))
            )
            return cls(options.by_pattern, (*options.skip, *_patterns(skip, "skip")), both)
        given = dict(options) if isinstance(options, Mapping) else {"*": options}
        for pattern, pattern_options in given.items():
            if not isinstance(pattern, str) or not isinstance(pattern_options, Options):
                raise OptionsError(
                    "options must be qcompress.Options, such as prune_quantize(), or a mapping from patterns "
                    f"of layer names to them; found {pattern!r}: {type(pattern_options).__name__}"
                )
        if not given:
            raise OptionsError("no options are given: pass prune_quantize(), or a mapping of at least one pattern")
        return cls(given, _patterns(skip, "skip"), None if only is None else _patterns(only, "only"))

    def skipped(self, *names: str) -> str:
        """Return why a layer with these names must not change, or an empty string."""
        pattern = self._match(names, self.skip)
        return f"{_LEFT_OUT}skip={pattern!r}" if pattern else ""

    def left_out(self, *names: str) -> str:
        """Return why a layer with these names is left out, or an empty string."""
        if why := self.skipped(*names):
            return why
        if self.only is not None and not self._match(names, self.only):
            return f"{_LEFT_OUT}only="
        return "" if self._match(names, self.by_pattern) else _UNMATCHED

    def options(self, *names: str) -> Options:
        """Return the options for a layer that is not left out."""
        return self.by_pattern[self._match(names, self.by_pattern)]

    def require_known(self, names: Sequence[str]) -> None:
        """Raise an error for patterns that match no layer.

        Args:
            names: names of all layers.

        Raises:
            OptionsError: a pattern matches no layer; the message lists the patterns and the layers.
        """
        patterns = (*self.skip, *(self.only or ()), *(listed for listed in self.by_pattern if listed != "*"))
        unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if unused:
            more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
            raise OptionsError(
                f"no layer has a name like {', '.join(map(repr, unused))}; there are: {', '.join(names[:SHOWN])}{more}"
            )

    def to_json(self) -> Any:
        """Return plain JSON that identifies the offer; for options without patterns, the JSON of the options."""
        if not self.skip and self.only is None and list(self.by_pattern) == ["*"]:
            return self.by_pattern["*"].to_json()
        options = [[pattern, offered.to_json()] for pattern, offered in self.by_pattern.items()]  # the first counts
        return {"options": options, "skip": list(self.skip), "only": None if self.only is None else list(self.only)}

    def code(self) -> Identity:
        """Return the identity of the code of all options, which `to_json` does not contain."""
        return code_of(offer for offered in self.by_pattern.values() for offer in offered.offers)

    def _match(self, names: Sequence[str], patterns: Iterable[str]) -> str:
        return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), "")


def says_left_out(reason: str) -> bool:
    """Whether a reason is one of `Offered.left_out`."""
    return reason.startswith(_LEFT_OUT) or reason == _UNMATCHED


def _patterns(given: Any, name: str) -> tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    wrong = [pattern for pattern in listed if not isinstance(pattern, str)]
    if wrong:
        raise OptionsError(
            f"{name} must list patterns of layer names, such as ('head', 'encoder.*'), found {wrong[0]!r}"
        )
    return listed


def calibrated_options(parts: Iterable[Part], offered: Offered) -> tuple[dict[str, Options], list[str]]:
    """Return the options by part name, and notes on the parts that are too wide for one matrix of second moments."""
    per_part, notes = {}, []
    for part in parts:
        options, width = offered.options(part.path, part.modules[0]), part.target.per_channel
        large = part.target.layer != "Embedding" and width > column_blocks.MAX_INPUTS
        if large and options.need_moments(part.target):
            given, options = options, options.calibrated_in_blocks(part.target)
            wide = f"a channel has {width:,} weights, more than {column_blocks.MAX_INPUTS:,}"
            if options.need_moments(part.target):
                size = column_blocks.block_size(width)
                notes.append(f"{part.name}: inputs count as independent where {size:,} columns or more apart, {wide}")
            if options != given:
                notes.append(f"{part.name}: no compensation and no whitening of options that take all inputs, {wide}")
        per_part[part.name] = options
    return per_part, notes
