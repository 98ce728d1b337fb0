"""What a compression run reports: sizes, losses predicted and true, the proof, and every part's choice."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.formatting import amount, plural
from qcompress.budgets import FILE_BYTES, LATENCY
from qcompress.guard import Candidate

FILE_KIND = FileKind("qcompress report", version=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """One part's choice: option, bytes before and after, predicted loss increase of this option alone."""

    name: str
    option: str
    bytes_before: float
    bytes_after: float
    loss_alone: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one run. Losses are increases per sample, in nats for ``kl``.

    Attributes:
        loss_predicted: the problem's objective for the choice.
        loss_validation: the true loss of the compressed model on samples that nothing was fitted to, after any
            fine-tuning, or None where there are none. ``refitted``, it is that of the same choice before the refit.
        refitted: whether codes and factors were fitted anew after the choice, to all the data; no sample kept aside is
            then left that the model has not seen.
        loss_measured: that on all the data that was given, fitted to or not, before any fine-tuning.
        loss_finetuned: that of the fine-tuned model, or None.
        bound, gap, status: the proof, as the solver gave it, of the predicted loss and nothing else; ``gap`` relative
            to ``loss_predicted``.
        usage, original, budgets: resource → amount (``bytes``, ``macs`` per sample, ``latency_s`` per batch).
        latency_measured_s: seconds of the whole compressed model in the engine, beside the predicted ``latency_s`` of
            ``usage``; None where no engine was timed.
        metric_before, metric_after: what the caller's ``evaluate`` gave, or None.
        parts: every part's choice.
        skipped: name → why it stays as it is.
        skipped_bytes: name → its bytes.
        refined: what `refine` brought (see `Refined`), or None; ``loss_predicted`` and ``bound`` are still those of the
            first prediction.
        smallest: the smallest use that was found for a limit of the loss (see `solvers.smallest_use`), or None.
        candidates: what the guard tried, ``(name, loss_predicted, loss_validation, usage)`` each; the compressed model
            is the one of least loss on the held-out samples, called ``chosen``.
        undecided: what lost less there than the choice that all have to beat, but no more than chance would have it.
        warnings: where these numbers may not hold, and what would help.
    """

    loss: str
    loss_predicted: float
    loss_measured: float
    loss_finetuned: float | None
    bound: float | None
    gap: float | None
    status: str
    solver: str
    wall_s: dict[str, float]
    usage: dict[str, float]
    original: dict[str, float]
    budgets: dict[str, float]
    metric_before: float | None
    metric_after: float | None
    parts: tuple[PartReport, ...]
    skipped: dict[str, str]
    refined: dict[str, Any] | None = None
    smallest: dict[str, Any] | None = None
    loss_validation: float | None = None
    latency_measured_s: float | None = None
    refitted: bool = False
    candidates: tuple[Candidate, ...] = ()
    undecided: tuple[Candidate, ...] = ()
    chosen: str | None = None
    warnings: tuple[str, ...] = ()
    skipped_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def over_file_budget(self) -> float:
        """Bytes by which the file is larger than its budget; 0 where it is not, or where it has none."""
        return max(0.0, self.usage.get(FILE_BYTES, 0.0) - self.budgets.get(FILE_BYTES, math.inf))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        tried = {
            name: [candidate._asdict() for candidate in getattr(self, name)] for name in ("candidates", "undecided")
        }
        return {**asdict(self), **tried}

    def save(self, path: AnyPath) -> None:
        """Write the report as JSON, whole or not at all."""
        FILE_KIND.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Report":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is not whole, or of another kind or version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            for name, made in (("parts", PartReport), ("candidates", Candidate), ("undecided", Candidate)):
                value[name] = tuple(made(**entry) for entry in value.get(name, ()))
            return cls(**{**value, "warnings": tuple(value.get("warnings", ()))})

    def to_markdown(self) -> str:
        """A readable summary."""
        lines = [
            "# Compression",
            "",
            *(f"> **WARNING:** {text}\n" for text in self.warnings),
            "| resource | original | budget | compressed | ratio |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, used in self.usage.items():
            before, budget = self.original[name], self.budgets.get(name)
            limit = "–" if budget is None else amount(budget)
            ratio = f"{before / used:.2f}×" if used else "–"
            lines.append(f"| {name} | {amount(before)} | {limit} | {amount(used)} | {ratio} |")
        tuned = "" if self.loss_finetuned is None else f", after fine-tuning {self.loss_finetuned:.6g}"
        earlier = " before codes and factors were fitted to them too" if self.refitted else ""
        aside = "" if self.loss_validation is None else f"on held-out samples {self.loss_validation:.6g}{earlier}, "
        lines += [
            "",
            f"- loss increase ({self.loss}): predicted {self.loss_predicted:.6g}, {aside}"
            f"on all the data {self.loss_measured:.6g}{tuned}",
            self._proof(),
            *self._timing(),
            *self._minimizing(),
            *self._refining(),
            f"- time: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in self.wall_s.items())}",
        ]
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"- metric: {self.metric_before:.6g} before, {self.metric_after:.6g} after")
        lines += self._tried()
        lines += ["", "| part | choice | bytes before | after | loss alone |", "|---|---|--:|--:|--:|"]
        for part in self.parts:
            sizes = f"{part.bytes_before:,.0f} | {part.bytes_after:,.0f}"
            lines.append(f"| {part.name} | {part.option} | {sizes} | {part.loss_alone:.3g} |")
        if self.skipped:
            left = by_reason(self.skipped, self.skipped_bytes, self.original.get("bytes", 0.0))
            lines += ["", "Left unchanged:", "", *(f"- {line}" for line in left)]
        return "\n".join(lines) + "\n"

    def _minimizing(self) -> list[str]:
        if self.smallest is None:
            return []
        name, used, needed = (self.smallest[key] for key in ("resource", "usage", "at_least"))
        proof = "proven to be the smallest" if needed >= used else f"proven to need at least {amount(needed)}"
        return [
            f"- smallest {name} with a predicted loss of at most {self.smallest['at_most']:g}: {amount(used)}, {proof}"
        ]

    def _timing(self) -> list[str]:
        if self.latency_measured_s is None:
            return []
        seconds = self.original[LATENCY], self.usage[LATENCY], self.latency_measured_s
        before, predicted, measured = (f"{1000 * duration_s:.4g} ms" for duration_s in seconds)
        return [f"- time in the engine: {before} before, {predicted} predicted, {measured} measured"]

    def _proof(self) -> str:
        """What is known of the choice, and of what."""
        bound = "no bound" if self.gap is None else f"bound {self.bound:.6g}, gap {self.gap:.3%}"
        known = "proven optimal for the predicted loss" if self.status == "OPTIMAL" else "not proven optimal"
        return f"- choice: {self.status} by {self.solver}: {known} ({bound})"

    def _tried(self) -> list[str]:
        """The guard's table."""
        if not self.candidates:
            return []
        lines = [
            "",
            "Tried on the held-out samples:",
            "",
            "| choice | predicted | held out | |",
            "|---|--:|--:|---|",
        ]
        for group, note in ((self.candidates, ""), (self.undecided, "undecided: no clearer than chance")):
            for name, predicted, seen, _ in group:
                lines.append(f"| {name} | {predicted:.4g} | {seen:.4g} | {'taken' if name == self.chosen else note} |")
        return lines

    def _refining(self) -> list[str]:
        if self.refined is None:
            return []
        before, after, steps = self.refined["loss_before"], self.refined["loss"], self.refined["steps"]
        if not steps:
            return [f"- measured again around the choice: no better one found near it (loss {before:.6g})"]
        changes = ", ".join(str(step["changes"]) for step in steps)
        return [
            f"- measured again around the choice: loss {before:.6g} before, {after:.6g} after "
            f"{plural(len(steps), 'round')} (parts changed: {changes}); the bound is the first prediction's"
        ]


def by_reason(
    skipped: Mapping[str, str], size_bytes: Mapping[str, float], whole_bytes: float, most: int = 3
) -> list[str]:
    """A line for each reason why something stays as it is, with its share of the bytes and at most so many names.

    Args:
        skipped: name → reason.
        size_bytes: name → bytes; empty where they are not known (reports of earlier versions).
        whole_bytes: of the whole model.
        most: names in a line.

    >>> by_reason({"a": "a vector", "b": "a vector", "c": "empty"}, {"a": 6, "b": 4, "c": 0}, 1000, most=1)
    ['2 × a vector (1 % of the bytes): a, …', 'empty (0 % of the bytes): c']
    """
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the model itself")
    sizes: dict[str, float] = {}
    for name, reason in skipped.items():
        sizes[reason] = sizes.get(reason, 0.0) + size_bytes.get(name, 0.0)
    lines = []
    for reason, listed_names in names.items():
        count = f"{len(listed_names)} × " if len(listed_names) > 1 else ""
        share = f" ({100 * sizes[reason] / (whole_bytes or 1.0):.3g} % of the bytes)" if size_bytes else ""
        listed = ", ".join(listed_names[:most]) + (", …" if len(listed_names) > most else "")
        lines.append(f"{count}{reason}{share}: {listed}")
    return lines
