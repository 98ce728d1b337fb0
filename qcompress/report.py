"""The report of a compression run: sizes, predicted and true losses, the proof, and every part's choice."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.formatting import amount, markdown_table, plural, with_error
from qcompress.budgets import BITS_PER_WEIGHT, FILE_BYTES, LATENCY
from qcompress.guard import Candidate
from solvers.search import PROOF_TOLERANCE

FILE_KIND = FileKind("qcompress report", version=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """One part's choice: its option, bytes before and after, and the predicted loss increase of this option alone."""

    name: str
    option: str
    bytes_before: float
    bytes_after: float
    loss_alone: float
    loss_alone_error: float | None = None


MOST_NOTES = 5
"""Number of the measurement's notes that are shown."""

TRIED = ("candidates", "undecided", "rounds")
"""Fields of a report that are lists, and what they hold."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """The figures of one run. Losses are increases per sample, in nats for ``kl``.

    Attributes:
        loss: name of the loss.
        loss_predicted: the problem's objective for the choice.
        loss_predicted_error: standard error of ``loss_predicted`` if it is estimated from samples
            (``method="sampled"``), or None. It covers which samples and labels were drawn, not how well small changes
            describe the network.
        loss_validation: true loss of the compressed model on the held-out samples, after any fine-tuning, or None if
            there are none. If ``refitted``, it is the loss of the candidate ``chosen`` before, which had not seen them.
        loss_validation_error: standard error of ``loss_validation``, by which samples happened to be held out; None
            without such samples. Losses are heavy-tailed, so the error of few samples is itself uncertain.
        refitted: whether the result was made from all the data in the end: codes and factors fitted again, or the
            choice made again. No samples then remain that it has not seen.
        parts_moved: number of parts whose option changed when the way of choosing that won on the held-out samples was
            repeated on all the data (see `qcompress.steps.repeating`), or None without a guard.
        loss_measured: true loss on the calibration data (all of ``data``, with the samples held out of it), before any
            fine-tuning.
        loss_finetuned: the same after fine-tuning, or None.
        bound, gap, status: the solver's proof. It concerns the predicted loss only; ``gap`` is relative to
            ``loss_predicted``.
        solver: name of the solver.
        wall_s: step → seconds it took.
        usage, original, budgets: resource → amount (``bytes``, ``macs`` per sample, ``latency_s`` per batch).
        latency_measured_s: measured seconds of the whole compressed model in the engine, to compare with the predicted
            ``latency_s`` in ``usage``; None if no engine was timed.
        metric_before, metric_after: results of the caller's ``evaluate``, or None.
        metric_name: name of that function; ``"metric"`` if it has none.
        parts: the choice of every part that has one.
        skipped: name → why it stays unchanged, for weights that are not a part and parts without an option on offer.
        skipped_bytes: name → its bytes.
        refined: result of `refine` (see `Refined`), or None; ``loss_predicted`` and ``bound`` still refer to the first
            prediction.
        smallest: smallest use found for a limit on the loss (see `solvers.smallest_use`), or None.
        candidates: candidates evaluated by the guard, each ``(name, loss_predicted, loss_validation, usage)``: the one
            that won, which has the least loss of them on the held-out samples, and the others.
        undecided: candidates with a lower held-out loss than the one that won, but predicted to be worse or not clearly
            better.
        chosen: name of the candidate that won, or None.
        rounds: name, losses and use of every round if channels were removed in rounds (see `qcompress.compress`); the
            result is the last one's, unless the first loses less.
        warnings: where these numbers may not hold, and how to improve them.
        measuring: notes of the measurement, such as why a layer has none of the ranks on offer.
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
    skipped_bytes: dict[str, int]
    refined: dict[str, Any] | None = None
    smallest: dict[str, Any] | None = None
    loss_validation: float | None = None
    latency_measured_s: float | None = None
    refitted: bool = False
    parts_moved: int | None = None
    candidates: tuple[Candidate, ...] = ()
    undecided: tuple[Candidate, ...] = ()
    chosen: str | None = None
    rounds: tuple[Candidate, ...] = ()
    warnings: tuple[str, ...] = ()
    loss_predicted_error: float | None = None
    loss_validation_error: float | None = None
    metric_name: str = "metric"
    measuring: tuple[str, ...] = ()

    @property
    def over_file_budget(self) -> float:
        """Bytes by which the file exceeds its budget; 0 if it does not, or has no budget."""
        return max(0.0, self.usage.get(FILE_BYTES, 0.0) - self.budgets.get(FILE_BYTES, math.inf))

    @property
    def coverage(self) -> str:
        """How much of the model ``bits_per_weight`` refers to, in a sentence; empty if it is not in use."""
        if BITS_PER_WEIGHT not in self.usage:
            return ""
        share = sum(part.bytes_before for part in self.parts) / (self.original.get("bytes") or 1.0)
        return f"{BITS_PER_WEIGHT} counts the parts that have a choice: {100 * share:.3g} % of the bytes"

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        tried = {name: [candidate.to_json() for candidate in getattr(self, name)] for name in TRIED}
        return {**asdict(self), **tried}

    def save(self, path: AnyPath) -> None:
        """Write the report as JSON, atomically."""
        FILE_KIND.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Report":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is incomplete, or of another kind or version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            value |= {name: tuple(map(Candidate.from_json, value[name])) for name in TRIED}
            value["parts"] = tuple(PartReport(**entry) for entry in value["parts"])
            return cls(**{**value, **{name: tuple(value.get(name, ())) for name in ("warnings", "measuring")}})

    def __repr__(self) -> str:
        uses = ", ".join(f"{amount(used)} of {amount(self.original[name])} {name}" for name, used in self.usage.items())
        gap = "no bound" if self.gap is None else f"gap {self.gap:.3%}"
        warnings = f", {plural(len(self.warnings), 'warning')}" if self.warnings else ""
        losses = f"{self.loss} predicted {self.loss_predicted:.4g}, measured {self.loss_measured:.4g}"
        return f"<Report: {uses}, {losses}, {self.status} of the prediction by {self.solver}, {gap}{warnings}>"

    def _repr_markdown_(self) -> str:
        """Show the tables in a notebook."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return a readable summary."""
        lines = [
            "# Compression",
            "",
            *(f"> **WARNING:** {text}\n" for text in self.warnings),
            self._resources(),
        ]
        tuned = "" if self.loss_finetuned is None else f", after fine-tuning {self.loss_finetuned:.6g}"
        earlier = " (before the final choice and fit, which use them too)" if self.refitted else ""
        held_out = self.loss_validation
        seen = "" if held_out is None else with_error(held_out, self.loss_validation_error, 6)
        aside = "" if held_out is None else f"on held-out samples {seen}{earlier}, "
        error = self.loss_predicted_error
        spread = "" if error is None else f" (standard error of sampling the data, and of nothing else: {error:.2g})"
        lines += [
            "",
            *(f"- {text}" for text in filter(None, (self.coverage,))),
            f"- loss increase ({self.loss}): predicted {self.loss_predicted:.6g}{spread}, {aside}"
            f"on the calibration data {self.loss_measured:.6g}{tuned}",
            self._proof(),
            *(f"- {note}" for note in self.notes()),
            f"- time: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in self.wall_s.items())}",
        ]
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"- {self.metric_name}: {self.metric_before:.6g} before, {self.metric_after:.6g} after")
        lines += self._tried()
        lines += ["", self._chosen_parts()]
        if self.skipped:
            left = by_reason(self.skipped, self.skipped_bytes, self.original.get("bytes", 0.0))
            lines += ["", "Left unchanged:", "", *(f"- {line}" for line in left)]
        return "\n".join(lines) + "\n"

    def notes(self) -> list[str]:
        """Return what measuring noted, and what this run did besides choosing, one sentence each."""
        told = [f"measuring: {note}" for note in self.measuring[:MOST_NOTES]]
        if len(self.measuring) > MOST_NOTES:
            told.append(f"measuring: {plural(len(self.measuring) - MOST_NOTES, 'more note')} in Report.measuring")
        return [
            *told, *self._timing(), *self._minimizing(), *self._refining(), *self._repeating(), *self._rounds()
        ]  # fmt: skip

    def _resources(self) -> str:
        """Table of what the model took and takes."""
        rows = []
        for name, used in self.usage.items():
            before, budget = self.original[name], self.budgets.get(name)
            limit = "–" if budget is None else amount(budget)
            rows.append([name, amount(before), limit, amount(used), f"{before / used:.2f}×" if used else "–"])
        return markdown_table(("resource", ">original", ">budget", ">compressed", ">ratio"), rows)

    def _chosen_parts(self) -> str:
        """Table of the parts and their options."""
        rows = []
        for part in self.parts:
            sizes = f"{part.bytes_before:,.0f}", f"{part.bytes_after:,.0f}"
            rows.append([part.name, part.option, *sizes, with_error(part.loss_alone, part.loss_alone_error, 3)])
        return markdown_table(("part", "choice", ">bytes before", ">after", ">loss alone"), rows)

    def _minimizing(self) -> list[str]:
        if self.smallest is None:
            return []
        name, used, needed = (self.smallest[key] for key in ("resource", "usage", "at_least"))
        proof = "proven to be the smallest" if needed >= used else f"proven to need at least {amount(needed)}"
        return [
            f"smallest {name} with a predicted loss of at most {self.smallest['at_most']:g}: {amount(used)}, {proof}"
        ]

    def _timing(self) -> list[str]:
        if self.latency_measured_s is None:
            return []
        seconds = self.original[LATENCY], self.usage[LATENCY], self.latency_measured_s
        before, predicted, measured = (f"{1000 * duration_s:.4g} ms" for duration_s in seconds)
        over = self.usage[LATENCY] > self.budgets.get(LATENCY, math.inf)
        note = "; the choice was made by measured times, as predicted it exceeds the budget" if over else ""
        return [f"time in the engine: {before} before, {predicted} predicted, {measured} measured{note}"]

    def _proof(self) -> str:
        """Describe what is proven about the choice."""
        bound = "no bound" if self.gap is None else f"bound {self.bound:.6g}, gap {self.gap:.3%}"
        if self.status == "OPTIMAL":
            known = "proven optimal for the predicted loss"
        elif self._optimum_tried():
            known = "the held-out samples prefer it to the choice that is proven optimal for the predicted loss"
        else:
            known = "not proven optimal"
        return f"- choice: {self.status} by {self.solver}: {known} ({bound})"

    def _optimum_tried(self) -> bool:
        """Whether the guard's choice has a larger predicted loss than a candidate that meets the bound."""
        if self.bound is None or self.chosen is None:
            return False
        limit = self.bound + PROOF_TOLERANCE * abs(self.bound)
        met = {candidate.name for candidate in self.candidates if candidate.loss_predicted <= limit}
        return bool(met) and self.chosen not in met

    def _tried(self) -> list[str]:
        """Table of the guard's candidates."""
        if not self.candidates:
            return []
        undecided = "undecided: predicted to be worse, or not clearly better"
        rows = [
            [name, f"{predicted:.4g}", f"{seen:.4g}", "taken" if name == self.chosen else note]
            for group, note in ((self.candidates, ""), (self.undecided, undecided))
            for name, predicted, seen, _ in group
        ]
        table = markdown_table(("choice", ">predicted", ">held out", ""), rows)
        return ["", "Tried on the held-out samples:", "", table]

    def _repeating(self) -> list[str]:
        if not self.parts_moved:
            return []
        return [
            f"chosen again on all the data in the way that won on the held-out samples: "
            f"{plural(self.parts_moved, 'part')} changed"
        ]

    def _rounds(self) -> list[str]:
        """Describe the rounds in which channels were removed."""
        lines = []
        for name, _, loss, usage in self.rounds:
            used = ", ".join(f"{resource} {amount(use)}" for resource, use in usage.items())
            lines.append(f"{name}: loss {loss:.6g}, {used}")
        if len(self.rounds) > 1 and (last := self.rounds[-1]).loss_predicted == self.loss_predicted:
            lines.append(f"parts: their bytes before are those of the network that {last.name} started from")
        return lines

    def _refining(self) -> list[str]:
        if self.refined is None:
            return []
        before, after, steps = self.refined["loss_before"], self.refined["loss"], self.refined["steps"]
        if not steps:
            return [f"measured again around the choice: no better one found near it (loss {before:.6g})"]
        changes = ", ".join(str(step["changes"]) for step in steps)
        return [
            f"measured again around the choice: loss {before:.6g} before, {after:.6g} after "
            f"{plural(len(steps), 'round')} (parts changed: {changes}); the bound is the first prediction's"
        ]


def by_reason(
    skipped: Mapping[str, str], size_bytes: Mapping[str, float], whole_bytes: float, most: int = 3
) -> list[str]:
    """One line for each reason why something stays unchanged, with its share of the bytes and a few names.

    Args:
        skipped: name → reason.
        size_bytes: name → bytes.
        whole_bytes: bytes of the whole model.
        most: maximum number of names in a line.

    >>> by_reason({"a": "a vector", "b": "a vector", "c": "empty"}, {"a": 6, "b": 4, "c": 0}, 1000, most=1)
    ['a vector (2 times, 1 % of the bytes): a, …', 'empty (0 % of the bytes): c']
    """
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name or "the model itself")
    sizes: dict[str, float] = {}
    for name, reason in skipped.items():
        sizes[reason] = sizes.get(reason, 0.0) + size_bytes[name]
    lines = []
    for reason, listed_names in names.items():
        facts = [f"{len(listed_names)} times"] if len(listed_names) > 1 else []
        facts.append(f"{100 * sizes[reason] / (whole_bytes or 1.0):.3g} % of the bytes")
        listed = ", ".join(listed_names[:most]) + (", …" if len(listed_names) > most else "")
        lines.append(f"{reason} ({', '.join(facts)}): {listed}")
    return lines
