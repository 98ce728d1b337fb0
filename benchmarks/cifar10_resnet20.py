"""ResNet-20 on CIFAR-10: accuracy and KL at equal bytes, chosen with pair terms, additively and uniformly.

One calibration set, three ways to choose, with codes rounded to nearest and with codes that make up for each other
(`compensated`). A budget of b bits on average is what all layers at b bits
take; where b is no bit-width the uniform choice is the largest one that fits (it then takes fewer bytes).

Pair terms are taken as `qcompress.formulate` does, and at full strength.

    python -m benchmarks.cifar10_resnet20 --data FOLDER [--depth 56]
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.tables import markdown, write_results
from formulations import Problem
from solvers import judge, solve

AVERAGE_BITS = (4.0, 3.5, 3.0, 2.5)
BITS = (2, 3, 4, 5, 6, 8)
SPARSITY = (0, 0.5, 0.75)
STRENGTHS: dict[str, bool | float] = {"additive": False, "pairs": True, "pairs, full strength": 1.0}


def uniform_choice(problem: Problem, bits: int) -> np.ndarray:
    """Every layer at that bit-width, without pruning."""
    names = f"{bits} bits", f"{bits} bits, compensated"
    return np.array([next(i for i, label in enumerate(labels) if label in names) for labels in problem.options])


def bits_budget(problem: Problem, average: float) -> float:
    """Bytes of all layers at ``average`` bits: between the uniform choices around it."""
    low, high = int(np.floor(average)), int(np.ceil(average))
    sizes = [problem.evaluate(uniform_choice(problem, bits)).usage["bytes"] for bits in (low, high)]
    return float(np.floor(sizes[0] + (sizes[1] - sizes[0]) * (average - low)))


FAMILIES = {  # options, and the methods that they are measured by
    "bits": (qcompress.prune_quantize(bits=BITS, sparsity=(0,)), ("fisher", "direct")),
    "bits + pruning": (qcompress.prune_quantize(bits=BITS, sparsity=SPARSITY), ("fisher",)),
    "bits, compensated": (qcompress.prune_quantize(bits=BITS, sparsity=(0,), compensated=True), ("fisher", "direct")),
    "bits + pruning, compensated": (
        qcompress.prune_quantize(bits=BITS, sparsity=SPARSITY, compensated=True),
        ("fisher",),
    ),
}
COLUMNS = {
    "options": "options",
    "average_bits": "average bits",
    "choice": "choice",
    "method": "measured by",
    "bytes": "bytes",
    "accuracy": "accuracy %",
    "kl": "KL",
    "gap": "proven gap",
}


class Judge:
    """Accuracy and KL on the test images of a choice; equal networks are run once."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self._model, self._inputs, self._labels = model, inputs, labels
        self.reference = cifar.logits(model, inputs)
        self._seen: dict[bytes, dict[str, float]] = {}

    def __call__(self, measurement: qcompress.Measurement, solution: qcompress.Solution) -> dict[str, float]:
        smaller = qcompress.apply(self._model, measurement, solution)
        key = b"".join(tensor.numpy().tobytes() for tensor in smaller.state_dict().values())
        if key not in self._seen:
            output = cifar.logits(smaller, self._inputs)
            accuracy, kl = cifar.accuracy(output, self._labels), cifar.kl(self.reference, output)
            self._seen[key] = {"accuracy": accuracy, "kl": kl}
        return self._seen[key]


def choices(
    measurement: qcompress.Measurement, average: float, budget: float, time_limit: float, *, with_uniform: bool
) -> Iterator[tuple[str, qcompress.Solution]]:
    """The choices to compare within a budget in bytes, by name."""
    if with_uniform:
        stated = qcompress.formulate(measurement, {"bytes": budget}, pairs=False)
        yield "uniform", judge(stated, uniform_choice(stated, int(average)))
    for name, strength in STRENGTHS.items():
        stated = qcompress.formulate(measurement, {"bytes": budget}, pairs=strength)
        yield name, solve(stated, time_limit=time_limit, seed=0)


def main() -> None:
    arguments = _arguments()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(arguments.depth, folder)
    calibration, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, arguments.calibration)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    judged = Judge(model, inputs, labels)
    original = cifar.accuracy(judged.reference, labels)
    print(f"original: {original:.2f} % on {len(labels)} test images")
    rows: list[dict[str, Any]] = []
    budgets: dict[float, float] = {}  # what all layers at so many bits take, of the problem without pruning
    for family, method in [(family, method) for family, (_, methods) in FAMILIES.items() for method in methods]:
        start = time.perf_counter()
        measurement = qcompress.measure(model, cifar.batched(calibration), FAMILIES[family][0], method=method)
        seconds = time.perf_counter() - start
        print(f"{family}, {method}: measured {len(measurement.cost)} options in {seconds:.0f} s")
        problem = qcompress.formulate(measurement, {"bytes": 1.0})
        uniform_here = method == "fisher" and "pruning" not in family
        for average in AVERAGE_BITS:
            if average not in budgets:
                budgets[average] = bits_budget(problem, average)
            for name, solution in choices(
                measurement, average, budgets[average], arguments.time_limit, with_uniform=uniform_here
            ):
                row = {"options": family, "method": method, "average_bits": average, "choice": name}
                row |= judged(measurement, solution)
                row |= {"bytes": solution.usage["bytes"], "gap": solution.gap, "predicted": solution.objective}
                rows.append({**row, "status": str(solution.status)})
                print(json.dumps(rows[-1]))
    table = markdown(rows, COLUMNS)
    name = f"cifar10_resnet{arguments.depth}"
    write_results(Path(arguments.out), name, {"original": original, "rows": rows}, table)
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--calibration", type=int, default=512, help="training images to measure on")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for each solve")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
