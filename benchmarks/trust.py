"""Is the default ever worse than the simple choices? True losses on samples that nothing was calibrated on.

Models: ResNet-20 and ResNet-56 (CIFAR-10), a small vision transformer and a GRU (trained here on CIFAR-10's training
images, rows of pixels as a sequence). For every model, source and number of calibration images, family of options and
budget: `compress` with its defaults against the additive choice, pair terms and the best uniform setting, all three
measured on the whole calibration set without a guard. A journal keeps what is done: a cut run goes on.

Losses are KL divergences on a thousand images that were neither calibrated on nor trained on here (the residual
networks come trained, on CIFAR-10's training images, of which these are). The rule for defaults: never worse than 1.05
times the better of additive and uniform there.

    python -m benchmarks.trust --data FOLDER [--models resnet20 gru] [--quick]
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.tables import Rows, markdown, write_results
from formulations import Problem
from qcompress import low_rank, prune_quantize
from qcompress.proposals import uniform_settings
from solvers import judge, solve

RULE = 1.05
BITS = (2, 3, 4, 5, 6, 8)
FAMILIES = {
    "bits": prune_quantize(bits=BITS, sparsity=(0,)),
    "compensated": prune_quantize(bits=BITS, sparsity=(0,), compensated=True),
    "sparse": prune_quantize(bits=BITS, sparsity=(0, 0.5), compensated=True),
    "rank": low_rank(whitened=True),
    "joint": prune_quantize(bits=BITS, sparsity=(0,), compensated=True) + low_rank(whitened=True),
}
BUDGETS = {**dict.fromkeys(FAMILIES, ("bytes", (0.07, 0.035))), "rank": ("macs", (0.55, 0.4))}
"""Resource, and shares of what lies between its smallest possible use and the original's: about 4 and 3 bits."""

SOURCES = {"lossless": "cifar10_train4k_lossless", "jpeg": "cifar10_train4k_jpegsource"}
UNSEEN = slice(2000, 3000)
COLUMNS = {
    "model": "model",
    "source": "images",
    "samples": "of them",
    "family": "options",
    "budget": "budget",
    "default": "default",
    "additive": "additive",
    "pairs": "pair terms",
    "uniform": "uniform",
    "ratio": "default / better of additive and uniform",
    "chosen": "taken",
}


class Recurrent(nn.Module):
    """A GRU over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(96, 96, batch_first=True), nn.Linear(96, 10)
        self.inner = nn.Linear(96, 96)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.cells(images.movedim(1, 2).flatten(2))
        return self.head(torch.relu(self.inner(states[:, -1])))


class VisionTransformer(nn.Module):
    """Patches of 8 × 8 pixels, two encoder layers, the mean of the states."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.places = nn.Parameter(torch.zeros(1, 16, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(images).flatten(2).mT + self.places).mean(dim=1))


def trained(model: nn.Module, folder: Path, epochs: int = 6) -> nn.Module:
    """The model after a short training on images 1,024 to 2,000 of both sources."""
    batches = [cifar.images(folder, name, 1024, 2000) for name in SOURCES.values()]
    inputs, labels = (torch.cat(own) for own in zip(*batches, strict=True))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    return model.eval()


MODELS = {
    "resnet20": lambda folder: cifar.resnet(20, folder),
    "resnet56": lambda folder: cifar.resnet(56, folder),
    "gru": lambda folder: trained(Recurrent(), folder),
    "vit": lambda folder: trained(VisionTransformer(), folder),
}


def uniform_choice(measurement: qcompress.Measurement, problem: Problem) -> np.ndarray | None:
    """Of the uniform settings that fit, the one of least additive loss."""
    settings = [own.choice for own in uniform_settings(measurement, problem)]
    return min(settings, key=lambda choice: problem.cost[problem.flat(choice)].sum(), default=None)


def cells(model: nn.Module, inputs: Tensor, unseen: Tensor, family: str, time_limit: float) -> Iterator[dict[str, Any]]:
    """A row for every budget."""
    data, reference = cifar.batched(inputs), cifar.logits(model, unseen)
    whole = qcompress.measure(model, data, FAMILIES[family])

    def lost(smaller: nn.Module) -> float:
        return cifar.kl(reference, cifar.logits(smaller, unseen))

    with tempfile.TemporaryDirectory() as place:
        resource, shares = BUDGETS[family]
        original = whole.original[resource]
        smallest = qcompress.formulate(whole, {resource: original}).minimum_usage()[resource]
        for share in shares:
            budget = {resource: float(np.floor(smallest + share * (original - smallest)))}
            row: dict[str, Any] = {"budget": f"{budget[resource] / original:.3f} of the {resource}", "share": share}
            for name, pairs in (("additive", False), ("pairs", True)):
                solution = solve(qcompress.formulate(whole, budget, pairs=pairs), time_limit=time_limit, seed=0)
                row[name] = lost(qcompress.apply(model, whole, solution))
            problem = qcompress.formulate(whole, budget)
            simple = uniform_choice(whole, problem)
            row["uniform"] = None if simple is None else lost(qcompress.apply(model, whole, judge(problem, simple)))
            result = qcompress.compress(
                model, data, budget=budget, options=FAMILIES[family], time_limit=time_limit, folder=place
            )
            row["default"], row["chosen"] = lost(result.model), result.report.chosen
            row["predicted"], row["kept_aside"] = result.report.loss_predicted, result.report.loss_validation
            row["ratio"] = row["default"] / min(row[own] for own in ("additive", "uniform") if row[own] is not None)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=tuple(SOURCES))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=tuple(FAMILIES))
    parser.add_argument("--samples", nargs="+", type=int, default=(64, 256, 1024), help="calibration images")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve")
    parser.add_argument("--quick", action="store_true", help="64 images only")
    arguments = parser.parse_args()
    folder, out = cifar.data_folder(arguments), Path(arguments.out)
    rows = Rows(out / "trust.json", {"time_limit": arguments.time_limit})
    for name in arguments.models:
        torch.manual_seed(0)
        model = MODELS[name](folder)
        for source in arguments.sources:
            unseen, _ = cifar.images(folder, SOURCES[source], UNSEEN.start, UNSEEN.stop)
            for samples in (64,) if arguments.quick else arguments.samples:
                inputs, _ = cifar.images(folder, SOURCES[source], 0, samples)
                for family in arguments.families:
                    cell = {"model": name, "source": source, "samples": samples, "family": family}
                    if len(rows.of(**cell)) == len(BUDGETS[family][1]):
                        continue
                    done = {row["budget"] for row in rows.of(**cell)}
                    for row in cells(model, inputs, unseen, family, arguments.time_limit):
                        if row["budget"] not in done:
                            rows.add({**cell, **row})
    values = rows.of()
    table = markdown(values, COLUMNS)
    ratios = np.array([row["ratio"] for row in values])
    gains = np.array([row["pairs"] / row["additive"] for row in values])
    table += (
        f"\n\n{len(values)} cells: the default is worse than {RULE:g} × the better of additive and uniform in "
        f"{int((ratios > RULE).sum())}, at most {ratios.max():.3g} ×; geometric mean "
        f"{np.exp(np.log(ratios).mean()):.3g}. "
        f"Pair terms alone against additive: geometric mean {np.exp(np.log(gains).mean()):.3g}, "
        f"from {gains.min():.3g} to {gains.max():.3g}.\n"
    )
    write_results(out, "trust", rows.values, table)
    print(table)


if __name__ == "__main__":
    main()
