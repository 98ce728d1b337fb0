"""Ranks for ResNet-20 and ResNet-56: our selection against those of the literature, at equal budget.

Every layer chooses among the same low-rank options (both matricisations). Budgets are shares of the network's macs or
parameters. All selections are judged on test images before and after the same fine-tuning (distillation from the
original on training images), and the factored network is timed against the dense one (one thread, batches of 128).

"beam" is the search on a measured objective (after BSR, arXiv 2111.15179): the true KL on 256 training images, 150
choices of it, led by the pair terms. VBMF knows no budget: its row is followed by ours at the same use. Rows are
written as they come, and a cut run goes on.

    python -m benchmarks.ranks_resnet --data FOLDER [--depth 56] [--whitened] [--steps 50]
        [--shares 0.7 0.5 0.4] [--resources macs bytes]
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qcompress
from benchmarks import cifar
from benchmarks.clock import time_ratios
from benchmarks.tables import Rows, markdown, write_results
from formulations import Problem
from formulations.generators.vbmf import vbmf_rank
from qcompress.transforms.low_rank.factors import LowRank
from solvers import beam_search, judge, solve
from solvers.baselines import penalty, threshold, uniform

RATIOS = tuple(np.round(np.linspace(0.08, 0.92, 25), 3).tolist())
SELECTIONS = ("pairs", "additive", "beam", "uniform", "energy", "LC", "ALDS")
MEASURED, LOOKS = 256, 150
Way = Callable[[Problem, str], np.ndarray | None]
COLUMNS = {
    "budget": "budget",
    "choice": "chosen by",
    "used": "used",
    "predicted": "predicted",
    "kl": "KL",
    "accuracy": "accuracy %",
    "kl_tuned": "KL, tuned",
    "accuracy_tuned": "accuracy %, tuned",
    "time": "time / dense",
}


def norms(model: nn.Module, measurement: qcompress.Measurement) -> tuple[np.ndarray, np.ndarray]:
    """The largest singular value of each option's error relative to the weight's, and the square of the weight's."""
    spectral, square = [], []
    for weight, transforms in zip(measurement.weights(model), measurement.transforms, strict=True):
        largest = torch.linalg.matrix_norm(weight.rows, ord=2)
        for transform in transforms:
            lost = weight.rows - transform.approximate(weight)
            spectral.append(float(torch.linalg.matrix_norm(lost, ord=2) / largest))
            square.append(float(weight.rows.square().sum()))
    return np.array(spectral), np.array(square)


def vbmf(model: nn.Module, measurement: qcompress.Measurement) -> np.ndarray:
    """Choose in every layer the rank that VBMF finds in its channels, or the nearest rank available."""
    choice = []
    for part, transforms in zip(measurement.parts, measurement.transforms, strict=True):
        rows = part.weight(model)
        rank = max(1, vbmf_rank(torch.linalg.svdvals(rows).numpy(), (rows.shape[0], rows.shape[1])))
        offered = {
            i: transform.ranks[0]
            for i, transform in enumerate(transforms)
            if isinstance(transform, LowRank) and transform.form == "channels"
        }
        offered[0] = min(rows.shape)
        choice.append(min(offered, key=lambda i: abs(offered[i] - rank)))
    return np.array(choice)


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """The network with the data for making and judging selections."""

    model: nn.Module
    measurement: qcompress.Measurement
    training: torch.Tensor
    inputs: torch.Tensor
    labels: torch.Tensor
    time_limit: float
    steps: int

    @cached_property
    def ways(self) -> dict[str, Way]:
        """Functions by name of a selection, each from a problem and its budgeted resource to a choice."""
        images = cifar.batched(self.training[:MEASURED])
        true_loss = qcompress.TrueLoss(self.model, self.measurement, images)
        spectral, square = norms(self.model, self.measurement)
        error, limit = self.measurement.error, self.time_limit
        return {
            "pairs": lambda problem, _: solve(problem, time_limit=limit, seed=0).choice,
            "additive": lambda problem, _: solve(problem, time_limit=limit, seed=0).choice,
            "beam": lambda problem, _: beam_search(problem, true_loss, max_measurements=LOOKS).choice,
            "uniform": uniform,
            "energy": lambda problem, _: threshold(problem, error),
            "LC": lambda problem, resource: penalty(problem, resource, error * square),
            "ALDS": lambda problem, _: threshold(problem, spectral),
            "VBMF": lambda *_: vbmf(self.model, self.measurement),
        }

    @cached_property
    def reference(self) -> torch.Tensor:
        """The original's outputs for the test images."""
        return cifar.logits(self.model, self.inputs)

    def row(self, budget: str, name: str, resource: str, share: float) -> dict[str, Any]:
        """The row of one selection at one budget, before and after fine-tuning."""
        problem = qcompress.formulate(self.measurement, {resource: share}, pairs=name in ("pairs", "beam"))
        row: dict[str, Any] = {"budget": budget, "choice": name}
        choice = self.ways[name](problem, resource)
        if choice is None:
            return row
        solution = judge(problem, choice)
        smaller = qcompress.apply(self.model, self.measurement, solution)
        row |= {
            "used": solution.usage[resource] / self.measurement.original[resource],
            "predicted": solution.objective,
            **self.judged(smaller),
            "time": time_ratios(smaller, self.model, self.inputs[:128])["wall"],
        }
        if self.steps:
            batches = cifar.batched(self.training)
            tuned = qcompress.finetune(smaller, batches[:-4], self.steps, teacher=self.model, validation=batches[-4:])
            row |= {f"{key}_tuned": value for key, value in self.judged(tuned).items()}
        return row

    def judged(self, model: nn.Module) -> dict[str, float]:
        """KL and accuracy on the test images."""
        output = cifar.logits(model, self.inputs)
        return {"kl": cifar.kl(self.reference, output), "accuracy": cifar.accuracy(output, self.labels)}


def main() -> None:
    arguments = _arguments()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(arguments.depth, folder)
    training, _ = cifar.images(folder, "cifar10_train4k_jpegsource")
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    options = qcompress.low_rank(ratios=RATIOS, kinds=("channels", "spatial"), whitened=arguments.whitened)
    study = Study(
        model=model,
        measurement=qcompress.measure(model, cifar.batched(training[:512]), options),
        training=training,
        inputs=inputs,
        labels=labels,
        time_limit=arguments.time_limit,
        steps=arguments.steps,
    )
    original = cifar.accuracy(study.reference, labels)
    print(f"original: {original:.2f} % on {len(labels)} test images")
    name, out = f"ranks_resnet{arguments.depth}" + ("_whitened" if arguments.whitened else ""), Path(arguments.out)
    settings = {
        setting: getattr(arguments, setting) for setting in ("depth", "whitened", "steps", "test", "time_limit")
    }
    rows = Rows(out / f"{name}.json", {"original": original, **settings})

    def add(budget: str, choice: str, resource: str, share: float) -> dict[str, Any]:
        if not rows.of(budget=budget, choice=choice):
            rows.add(study.row(budget, choice, resource, share))
        return rows.of(budget=budget, choice=choice)[0]

    for resource in arguments.resources:
        for share in arguments.shares:
            budget = f"{share:g} of the {'parameters' if resource == 'bytes' else resource}"
            for selection in SELECTIONS:
                add(budget, selection, resource, share)
        used = add(f"VBMF's {resource}", "VBMF", resource, 1.0)["used"]
        add(f"VBMF's {resource}", "pairs", resource, used)
    table = markdown(rows.of(), COLUMNS)
    write_results(out, name, rows.values, table)
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.7, 0.5, 0.4), help="budgets")
    parser.add_argument("--resources", nargs="+", choices=("macs", "bytes"), default=("macs", "bytes"))
    parser.add_argument("--whitened", action="store_true", help="factors that are closest on the calibration images")
    parser.add_argument("--steps", type=int, default=50, help="of fine-tuning, 128 images each; 0 for none")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
