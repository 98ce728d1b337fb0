"""Warnings of a report: where its numbers may not hold on other data, and how to improve them."""

import math
from collections.abc import Iterator

from formulations.formatting import plural
from qcompress.engines.in_time import TOLERANCE
from qcompress.measurement import Measurement
from qcompress.measuring.methods.reruns import unconfirmed
from qcompress.model.samples import Split
from qcompress.proposals import has_few_inputs
from qcompress.transforms.channels import RemoveChannels
from solvers import Solution

FACTOR = 2.0
"""Ratio of predicted and held-out loss above which the report warns."""

LEAST_NATS = 1e-3
"""Difference of ``kl`` losses below which the report does not warn, unless their ratio is above `FAR`."""

FAR = 10.0
"""Ratio of predicted and held-out loss above which the report warns of smaller differences as well."""

LEAST_NATS_FAR = 1e-5
"""Difference of ``kl`` losses below which the report never warns."""

DOUBT = 1.0
"""Expected number of wrong answers of the original on the held-out samples below which their loss proves little."""

INFINITE = 1e12
"""Loss in nats that counts as infinite: minus infinity in outputs is replaced by a finite number."""

MARGIN = 1.1
"""A measured loss up to this factor above a limit may differ by the choice of samples alone: no warning."""


def what_helps(
    measurement: Measurement, *, opened: bool, given: bool = False, refined: bool = False, in_rounds: bool = False
) -> str:
    """Suggest what makes predictions better. The same run would accept each suggestion.

    Args:
        measurement: the measurement.
        opened: whether the model is read block by block.
        given: whether the run got the measurement, rather than making it.
        refined: whether the run measures again around the choice already.
        in_rounds: whether it removes channels in rounds already.
    """
    helps = ["more calibration samples"]
    if measurement.sets:
        if not (given or in_rounds):
            helps.append("channels removed in rounds (rounds=3, --rounds 3)")
    elif not refined and not any(option.activations for options in measurement.transforms for option in options):
        helps.append("measuring again around the choice (refine_rounds=2, --refine-rounds 2)")
    if opened:
        helps.append("costs measured one by one with the model loaded whole (method='direct')")
    elif measurement.method != "direct":
        python, flag = ("measure(method='direct')", "qcompress measure ") if given else ("method='direct'", "")
        helps.append(f"costs measured one by one ({python}, {flag}--method direct)")
    return " and ".join(filter(None, (", ".join(helps[:-1]), helps[-1])))


def of_split(split: Split, *, given: bool) -> Iterator[str]:
    """Warn if samples could not be held out, or may have been seen by a measurement that was given."""
    if given and split.num_kept:
        yield (
            "the given measurement may have used the held-out samples; give validation= with batches that it did not "
            "use"
        )
    if split.unit == "samples" and split.num_kept and not 0.5 <= split.num_kept / split.num_wanted < 1.75:
        yield (
            f"{split.num_kept} of {split.num_samples} samples were held out instead of {split.num_wanted}, as equal "
            "samples are held out together or not at all: give fewer copies and more different samples, or validation= "
            "with other batches of the same kind (--validation)"
        )
    if split.unit == "batches" and split.num_kept:
        yield (
            f"whole batches were held out, {split.num_kept} of {split.num_samples}, as single samples cannot be: "
            f"{split.why_not}"
        )
    elif split.why_not:
        yield (
            f"no samples were held out: {split.why_not}. The choice was therefore not checked; give validation= with "
            "other batches of the same kind (--validation), or guard=False (--no-guard)"
        )


def of_prediction(loss: str, predicted: float, seen: float, helps: str) -> Iterator[str]:
    """Warn if the prediction did not hold on the held-out samples; ``helps`` is the result of `what_helps`."""
    low, high = sorted((abs(predicted), abs(seen)))
    ratio = high / low if predicted * seen > 0 else math.inf
    limits = ((FACTOR, LEAST_NATS), (FAR, LEAST_NATS_FAR)) if loss.startswith("kl") else ((FACTOR, 0.0),)
    if any(abs(seen - predicted) > least and ratio > factor for factor, least in limits):
        worse = "more" if seen > predicted else "less"
        factor_words = f" (a factor of {ratio:.3g})" if ratio < math.inf else ""
        if loss.startswith("kl") and seen > INFINITE:
            factor_words = (
                " (in truth it is infinite: the smaller model masks, by minus infinity, what the original does not; "
                "use the outputs before masking, with forward=)"
            )
        yield (
            f"the loss on held-out samples, {seen:.6g}, is {worse} than the predicted one, {predicted:.6g}"
            f"{factor_words}: the proof is of the prediction only. What helps: {helps}"
        )


def of_probabilities(loss: str, *, given: bool) -> Iterator[str]:
    """Warn if the original's outputs are probabilities (``given``): the loss applies a softmax to them again."""
    if given:
        yield (
            f"the model's outputs are probabilities, and the loss {loss!r} takes a softmax of them again: all its "
            "numbers are those of much flatter distributions, and far too low. Give their logarithms, "
            "forward=lambda model, batch: model(batch).clamp(min=1e-30).log() (--forward), or let the model end before "
            "its softmax"
        )


def of_selections(measurement: Measurement, helps: str) -> Iterator[str]:
    """Warn if the network selects by computed numbers, with weights whose options were not all run."""
    if (selecting := unconfirmed(measurement)) and measurement.method != "direct":
        where = f"{plural(len(selecting), 'module')}, such as {selecting[0]!r}" if selecting[0] else "the model itself"
        yield (
            "the network makes hard decisions (experts that a router takes, the largest of some numbers; in "
            f"{where}): an option that changes one loses more than predicted, and the standard error does not cover "
            f"it. Judge by losses on held-out samples. What helps: {helps}"
        )


def of_certainty(doubt: float | None) -> Iterator[str]:
    """Warn if the original is sure of all held-out samples, which then include none that it is unsure of.

    Args:
        doubt: its expected number of wrong answers on these samples, or None if the loss has no probabilities.
    """
    if doubt is not None and doubt < DOUBT:
        yield (
            f"the network is sure of all its answers on the held-out samples (it expects {doubt:.2g} wrong ones): on "
            "samples that it is unsure of, the loss can be many times as large as predicted and held out. Give more "
            "samples, or harder ones (validation=, --validation)"
        )


def of_limit(limit: float | None, seen: float, helps: str) -> Iterator[str]:
    """Warn if the limit on the loss is not kept by a measured loss, however small both are."""
    if limit is not None and seen > limit * MARGIN:
        yield (
            f"the measured loss, {seen:.6g}, is {seen / limit:.3g} times the limit of {limit:g}: only the predicted "
            f"loss is within it. Ask for a lower limit to keep this one; what makes the prediction better: {helps}"
        )


def of_inputs(measurement: Measurement, solution: Solution, fitted: Measurement | None = None) -> Iterator[str]:
    """Warn if something was fitted to fewer inputs than the dimension of a layer's input.

    Args:
        measurement: measurement whose samples are counted.
        solution: a choice from ``measurement``.
        fitted: the measurement with the moments that the codes were finally fitted to, if different.
    """
    assert solution.choice is not None  # noqa: S101
    fitted = measurement if fitted is None else fitted
    few = {}
    for index, (options, option) in enumerate(zip(measurement.transforms, solution.choice.tolist(), strict=False)):
        part = measurement.parts[index]
        if options[option].needs_moments(part.target) and has_few_inputs(fitted, index):
            few[part.name] = fitted.num_inputs[part.path], fitted.moments[part.path].shape[-1]
    if few:
        name = min(few, key=lambda layer: few[layer][0] / few[layer][1])
        num_inputs, width = few[name]
        path = next(part.path for part in measurement.parts if part.name == name)
        samples = round(measurement.num_samples * num_inputs / measurement.num_inputs[path])
        needed = max(math.ceil(samples * width / num_inputs) for num_inputs, width in few.values())
        yield (
            f"{len(few)} of {len(measurement.parts)} parts were fitted to fewer calibration inputs than the dimension "
            f"of their input ({name!r}: {num_inputs:,} for {width:,}), which does not generalise: "
            f"{needed:,} samples like these would be enough (now {samples:,})"
        )


def of_attention(measurement: Measurement, solution: Solution) -> Iterator[str]:
    """Warn if no attention layer that could be left out remains: a cache of keys and values then holds nothing."""
    assert solution.choice is not None  # noqa: S101
    attention = {item.name for item in measurement.sets if item.work > 0}
    chosen = [
        options[option] for options, option in zip(measurement.transforms, solution.choice.tolist(), strict=False)
    ]
    left_out = {
        part.name
        for part, own in zip(measurement.parts, chosen, strict=False)
        if isinstance(own, RemoveChannels) and len(own.removed) == own.units
    }
    if attention and attention <= left_out:
        yield (
            f"all {plural(len(attention), 'attention layer')} on offer are left out: if no other remains, the cache of "
            "keys and values of a language model holds nothing, and it writes correctly with use_cache=False only"
        )


def of_latency(budget: float | None, measured: float | None) -> Iterator[str]:
    """Warn if the whole model exceeds its time budget in the engine, although the choice was timed as a whole."""
    if budget is not None and measured is not None and measured > budget * (1 + TOLERANCE):
        yield (
            f"the model takes {1000 * measured:.4g} ms in the engine, {measured / budget - 1:.1%} more than its "
            f"budget of {1000 * budget:.4g} ms, and no choice that was timed is faster: raise the budget, or measure "
            "with faster options on offer"
        )
