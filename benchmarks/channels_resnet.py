"""Channels of a network removed at equal macs: this project's choice against uniform widths and global rankings.

The networks are ResNet-20 and ResNet-56 on CIFAR-10, and EfficientNet-Lite0 on pictures of ImageNet.

This project: the number of channels that each coupled set keeps is solved for, from the measured loss of every option.
The layers that read a set are refitted to the remaining channels, then all layers are fitted one after the other; both
steps are also left out for comparison. Alternatives at no more macs: the same share of every set, by mean absolute
weight (L1); all units ranked together by Fisher score per saved mac (Taylor pruning does this with squares, arXiv
1906.10771); and, if torch-pruning is installed, its global group magnitude and group Taylor importance. Every row is
evaluated on test images after cutting, after re-estimating batch-norm statistics, and after the same fine-tuning
(distillation from the original). Equal macs are not equal time, so each alternative is also cut as far as it takes no
more measured time than this project's choice (processor time on one thread, in turn with the original's).

The measurement and the rows are kept in ``--out``; an interrupted run resumes.

    python -m benchmarks.channels_resnet --data FOLDER [--depth 56] [--shares 0.7 0.5] [--steps 50]
    python -m benchmarks.channels_resnet --data FOLDER --network efficientnet --calibration 64 --test 400
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar, efficientnet
from benchmarks.clock import time_ratios
from benchmarks.tables import Rows, markdown, write_results
from qcompress.compressed.removal import remove_
from qcompress.measurement import Measurement
from qcompress.model.batch_norm import reestimate_
from qcompress.model.counting import count
from qcompress.model.coupled import CoupledSet
from qcompress.model.losses import as_loss
from qcompress.model.tensors import total_bytes
from qcompress.structure.find import find_sets
from qcompress.structure.scores import by_weight, sensitivity
from qcompress.structure.uses import Uses, uses_of
from solvers import solve

OURS: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether layers are fitted in turn
    "ours": ({}, True),
    "ours, not fitted in turn": ({}, False),
    "ours, nothing made up for": ({"reconstructed": False}, False),
}
THEIRS = {
    "torch-pruning, group magnitude": "GroupMagnitudeImportance",
    "torch-pruning, group Taylor": "GroupTaylorImportance",
}
UNIFORM = "uniform, L1"
Ranking = Callable[[float], dict[str, list[int]]]
"""Function from a pruning strength, 0 to 1, to the units that are removed from every set."""

FISHER = "ranked, Fisher for macs"
RIVALS = (UNIFORM, FISHER, *THEIRS)
IN_TIME = ", in the time of ours"
"""Ending of the names of rows whose macs follow from the time of ours at these macs."""

TOLERANCE = 0.01
"""Relative excess of a measured time up to which it counts as kept."""

TIMED = 16
"""Images in the batch that is timed."""

COLUMNS = {
    "share": "macs asked for",
    "choice": "chosen by",
    "macs": "macs",
    "time": "time",
    "bytes": "bytes",
    "gap": "gap",
    "kl": "KL",
    "accuracy": "accuracy %",
    "renormed": "batch norm taken again",
    "tuned": "fine-tuned",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A network and its images.

    Attributes:
        name: name of the results.
        head: name of the network's last layer.
        training: images for calibration and fine-tuning, and their classes.
        tests: images for evaluation, and their classes.
        batch: number of images in a step of fine-tuning.
    """

    name: str
    model: nn.Module
    head: str
    training: tuple[Tensor, Tensor]
    tests: tuple[Tensor, Tensor]
    batch: int


def _resnet(arguments: argparse.Namespace) -> Subject:
    folder = cifar.data_folder(arguments)
    return Subject(
        name=f"channels_resnet{arguments.depth}", model=cifar.resnet(arguments.depth, folder), head="linear", batch=128,
        training=cifar.images(folder, "cifar10_train4k_lossless"),
        tests=cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test),
    )  # fmt: skip


def _efficientnet(arguments: argparse.Namespace) -> Subject:
    inputs, classes = efficientnet.shuffled(cifar.data_folder(arguments))
    seen = max(arguments.calibration, len(inputs) - arguments.test)
    return Subject(
        name="channels_efficientnet", model=efficientnet.trained(), head="_fc", batch=16,
        training=(inputs[:seen], classes[:seen]), tests=(inputs[seen:], classes[seen:]),
    )  # fmt: skip


SUBJECTS = {"resnet": _resnet, "efficientnet": _efficientnet}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("network", "depth", "calibration", "keep", "test", "steps", "time_limit")
    return {name: getattr(arguments, name) for name in names}


def within(sets: tuple[CoupledSet, ...], uses: Uses, limit: float, removed_at: Ranking) -> dict[str, list[int]]:
    """The removal at the smallest strength between 0 and 1 that is within the macs."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        removed = removed_at(middle)
        kept = [item.num_units - len(removed[item.name]) for item in sets]
        low, high = (low, middle) if uses.of(kept)["macs"] <= limit else (middle, high)
    return removed_at(high)


def uniform_l1(model: nn.Module, sets: tuple[CoupledSet, ...]) -> Ranking:
    orders = {item.name: np.argsort(by_weight(model, item), kind="stable").tolist() for item in sets}
    return lambda share: {
        item.name: orders[item.name][: min(int(share * item.num_units), item.num_units - 1)] for item in sets
    }


def ranked_fisher(model: nn.Module, data: list[Tensor], sets: tuple[CoupledSet, ...], uses: Uses) -> Ranking:
    scores = sensitivity(model, data, sets, as_loss("kl"), None, 0).fisher
    whole = [item.num_units for item in sets]
    ranked = []
    for place, item in enumerate(sets):
        saved = uses.of(whole)["macs"] - uses.of([*whole[:place], whole[place] - 1, *whole[place + 1 :]])["macs"]
        ranked += [(score / saved, item.name, unit) for unit, score in enumerate(scores[item.name].tolist())]
    ranked.sort()

    def removed_at(share: float) -> dict[str, list[int]]:
        removed: dict[str, list[int]] = {item.name: [] for item in sets}
        sizes = {item.name: item.num_units for item in sets}
        for _, name, unit in ranked[: int(share * len(ranked))]:
            if len(removed[name]) < sizes[name] - 1:
                removed[name].append(unit)
        return removed

    return removed_at


def torch_pruned(subject: Subject, data: list[Tensor], kind: str, limit: float) -> nn.Module | None:
    """The least pruned of torch-pruning's models that is within the macs; None if the package is not installed."""
    try:
        import torch_pruning as pruning
    except ImportError:
        return None
    whole = subject.model
    if "Taylor" in kind:
        for batch, classes in zip(data, subject.training[1].split(len(data[0])), strict=False):
            nn.functional.cross_entropy(whole(batch), classes[: len(batch)]).backward()
    low, high, best = 0.0, 0.95, None
    for _ in range(10):
        ratio, smaller = 0.5 * (low + high), copy.deepcopy(whole)
        pruner = pruning.pruner.BasePruner(
            smaller, data[0][:1], importance=getattr(pruning.importance, kind)(), global_pruning=True,
            pruning_ratio=ratio, ignored_layers=[smaller.get_submodule(subject.head)],
        )  # fmt: skip
        for parameter, own in zip(whole.parameters(), smaller.parameters(), strict=True):
            own.grad = parameter.grad
        pruner.step()
        smaller.zero_grad(set_to_none=True)
        fits = count(smaller, data[:1], None).macs <= limit
        if fits:
            high, best = ratio, smaller
        else:
            low = ratio
    whole.zero_grad(set_to_none=True)
    return best


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--network", choices=SUBJECTS, default="resnet")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=56, help="of the ResNet")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.7, 0.5), help="of the macs that may stay")
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--keep", type=float, nargs="+", default=(0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125))
    parser.add_argument("--test", type=int, default=2500, help="test images")
    parser.add_argument(
        "--steps", type=int, default=50, help="of fine-tuning, 128 images each (EfficientNet: 16); 0 for none"
    )
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for each solve")
    return parser.parse_args()


class Study:
    """The network, its coupled sets, and the data for making and judging removals."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out, self.subject = arguments, Path(arguments.out), SUBJECTS[arguments.network](arguments)
        self.model, self.name = self.subject.model, self.subject.name
        self.data = cifar.batched(self.subject.training[0][: arguments.calibration], 64)
        self.inputs, self.labels = self.subject.tests
        self.reference = cifar.logits(self.model, self.inputs)
        self.sets = find_sets(self.model, self.data[:1]).sets
        self.uses = uses_of(self.model, self.sets, count(self.model, self.data[:1], None))
        self.whole = self.uses.of([item.num_units for item in self.sets])

    def measured(self, choice: str) -> Measurement:
        """Return the measurement of one of `OURS`, from its file if it exists."""
        file = self.out / f"{self.name}_{'_'.join(['measured', *OURS[choice][0]])}.npz"
        if not file.exists():
            options = qcompress.prune_channels(keep=self.arguments.keep, **OURS[choice][0])
            qcompress.measure(self.model, self.data, options, cache=file.with_suffix(".part")).save(file)
        return Measurement.load(file)

    def smaller_by(self, choice: str, share: float) -> tuple[nn.Module | None, float | None]:
        """Return the network with that share of the macs (None if a package is missing) and the gap of the choice."""
        limit = share * self.whole["macs"]
        if choice in OURS:
            measurement = self.measured(choice)
            problem = qcompress.formulate(measurement, {"macs": share})
            solution = solve(problem, time_limit=self.arguments.time_limit, seed=0)
            smaller = qcompress.apply(self.model, measurement, solution)
            return (
                qcompress.fit_in_turn_(smaller, self.model, self.data) if OURS[choice][1] else smaller
            ), solution.gap
        if choice in THEIRS:
            return torch_pruned(self.subject, self.data, THEIRS[choice], limit), None
        if choice == UNIFORM:
            ranking = uniform_l1(self.model, self.sets)
        else:
            ranking = ranked_fisher(self.model, self.data, self.sets, self.uses)
        return remove_(copy.deepcopy(self.model), self.sets, within(self.sets, self.uses, limit, ranking)), None

    def in_time(self, choice: str, most: float) -> nn.Module | None:
        """Return the network of a rival with the most macs whose time is at most ``most`` of the original's."""
        low, high, best = 0.0, 1.0, None
        for _ in range(7):
            share = 0.5 * (low + high)
            smaller, _ = self.smaller_by(choice, share)
            if smaller is None or self.time(smaller) > (1 + TOLERANCE) * most:
                high = share
            else:
                low, best = share, smaller
        return best

    def time(self, model: nn.Module) -> float:
        """Return the processor time of a batch relative to the original's."""
        return time_ratios(model, self.model, self.data[0][:TIMED])["time"]

    def row(self, choice: str, share: float, most: float | None = None) -> dict[str, Any]:
        """Return the row of one method at one share of the macs, or in at most ``most`` of the original's time."""
        row: dict[str, Any] = {"share": share, "choice": choice}
        if most is None:
            smaller, gap = self.smaller_by(choice, share)
        else:
            smaller, gap = self.in_time(choice.removesuffix(IN_TIME), most), None
        if smaller is None:
            return row
        output, renormed = cifar.logits(smaller, self.inputs), copy.deepcopy(smaller)
        reestimate_(renormed, self.data)
        row |= {
            "macs": count(smaller, self.data[:1], None).macs / self.whole["macs"],
            "time": self.time(smaller),
            "bytes": total_bytes(smaller) / self.whole["bytes"],
            "gap": gap,
            "kl": cifar.kl(self.reference, output),
            "accuracy": cifar.accuracy(output, self.labels),
            "renormed": self.accuracy(renormed),
        }
        if steps := self.arguments.steps:
            batches = cifar.batched(self.subject.training[0], self.subject.batch)
            start = renormed if row["renormed"] > row["accuracy"] else smaller
            tuned = qcompress.finetune(start, batches[:-4], steps, teacher=self.model, validation=batches[-4:])
            row["tuned"] = self.accuracy(tuned)
        return row

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test images in percent."""
        return cifar.accuracy(cifar.logits(model, self.inputs), self.labels)


def main() -> None:
    arguments = _arguments()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    study = Study(arguments)
    original = cifar.accuracy(study.reference, study.labels)
    rows = Rows(study.out / f"{study.name}.json", {"original": original, **settings_of(arguments)})
    print(f"original: {original:.2f} % on {len(study.labels)} test images", flush=True)
    for share in arguments.shares:
        for choice in (*OURS, *RIVALS):
            if not rows.of(share=share, choice=choice):
                rows.add(study.row(choice, share))
        ours = next(iter(OURS))
        most = rows.of(share=share, choice=ours)[0]["time"]
        for choice in (f"{rival}{IN_TIME}" for rival in RIVALS):
            if not rows.of(share=share, choice=choice):
                rows.add(study.row(choice, share, most))
    table = markdown(rows.of(), COLUMNS)
    write_results(study.out, study.name, rows.values, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
