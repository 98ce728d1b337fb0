"""Ranks for ResNet-20 and ResNet-56: our selection against those of the literature, at equal budget.

Every layer chooses among the same low-rank options (both matricisations). Budgets are shares of the network's macs or
parameters. All selections are judged on test images before and after the same fine-tuning (distillation from the
original on training images), and the factored network is timed against the dense one (one thread, batches of 128).

    python -m benchmarks.ranks_resnet --data FOLDER [--depth 56] [--whitened] [--steps 100]
        [--shares 0.7 0.5 0.4] [--resources macs bytes]
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.tables import markdown, write_results
from formulations import Problem
from qcompress.transforms.base import Weight
from solvers import judge, solve
from solvers.selectors import penalty, threshold, uniform

RATIOS = tuple(np.round(np.linspace(0.1, 0.9, 17), 3).tolist())
SELECTIONS = ("pairs", "additive", "uniform", "energy", "LC", "ALDS")


def norms(model: nn.Module, measurement: qcompress.Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Per option the largest singular value of its error, relative to the weight's; and the weight's square."""
    spectral, square = [], []
    for part, transforms in zip(measurement.parts, measurement.transforms, strict=True):
        weight = Weight(part.weight(model), part.target, measurement.moments_of(part))
        largest = torch.linalg.matrix_norm(weight.rows, ord=2)
        for transform in transforms:
            lost = weight.rows - transform.approximate(weight)
            spectral.append(float(torch.linalg.matrix_norm(lost, ord=2) / largest))
            square.append(float(weight.rows.square().sum()))
    return np.array([*spectral, 0.0]), np.array([*square, 0.0])  # the last group is what is fixed


def seconds(model: nn.Module, batch: Tensor) -> float:
    """Median time of a batch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with torch.no_grad():
        for _ in range(7):
            begun = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.7, 0.5, 0.4), help="budgets")
    parser.add_argument("--resources", nargs="+", choices=("macs", "bytes"), default=("macs", "bytes"))
    parser.add_argument("--whitened", action="store_true", help="factors that are closest on the calibration images")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning, 128 images each; 0 for none")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for each solve")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(arguments.depth, folder)
    training, _ = cifar.images(folder, "cifar10_train4k_jpegsource")
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    reference = cifar.logits(model, inputs)
    print(f"original: {cifar.accuracy(reference, labels):.2f} % on {len(labels)} test images")
    options = qcompress.low_rank(ratios=RATIOS, kinds=("channels", "spatial"), whitened=arguments.whitened)
    measurement = qcompress.measure(model, cifar.batched(training[:512]), options)
    error = np.append(measurement.error, 0.0)
    spectral, square = norms(model, measurement)
    dense_s = seconds(model, inputs[:128])

    def chosen(name: str, problem: Problem, resource: str) -> np.ndarray | None:
        if name == "uniform":
            return uniform(problem, resource)
        if name == "energy":
            return threshold(problem, error)
        if name == "ALDS":
            return threshold(problem, spectral)
        if name == "LC":
            return penalty(problem, resource, error * square)
        return solve(problem, time_limit=arguments.time_limit, seed=0).choice

    rows = []
    for resource in arguments.resources:
        for share in arguments.shares:
            for name in SELECTIONS:
                problem = qcompress.formulate(measurement, {resource: share}, pairs=name == "pairs")
                choice = chosen(name, problem, resource)
                row = {
                    "budget": f"{share:g} of the {'parameters' if resource == 'bytes' else resource}",
                    "choice": name,
                }
                if choice is not None:
                    solution = judge(problem, choice)
                    smaller = qcompress.apply(model, measurement, solution)
                    output = cifar.logits(smaller, inputs)
                    row |= {
                        "used": solution.usage[resource] / measurement.original[resource],
                        "predicted": problem.evaluate(choice).objective,
                        "kl": cifar.kl(reference, output),
                        "accuracy": cifar.accuracy(output, labels),
                        "time": seconds(smaller, inputs[:128]) / dense_s,
                    }
                    if arguments.steps:
                        batches = cifar.batched(training)
                        tuned = qcompress.finetune(
                            smaller, batches, arguments.steps, teacher=model, validation=batches[:4]
                        )
                        output = cifar.logits(tuned, inputs)
                        row |= {
                            "kl_tuned": cifar.kl(reference, output),
                            "accuracy_tuned": cifar.accuracy(output, labels),
                        }
                rows.append(row)
                print(row, flush=True)
    columns = {
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
    table = markdown(rows, columns)
    name = f"ranks_resnet{arguments.depth}" + ("_whitened" if arguments.whitened else "")
    values = {"original": cifar.accuracy(reference, labels), "rows": rows}
    write_results(Path(arguments.out), name, values, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
