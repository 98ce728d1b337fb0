"""A budget of latency against one of macs, for ResNet-20 and ResNet-56 on one thread: what does timing the options buy?

Every layer chooses among whitened low-rank options of three kinds. Each is timed in its layer's place
(`qcompress.time_options`, batches of 128), and the choice is made for shares of the network's latency. Against it: the
choice for macs, with the share of macs found by bisection that comes nearest to the same predicted latency from below.
Measured are the processor time and the wall time relative to the dense network's (medians of pairs, one after the
other), KL and accuracy on test images.

How near is the sum of the layers' times to the measured time? That is asked of these choices, of random ones, and of
a network of wide Linear layers, where low rank pays.

    python -m benchmarks.latency_resnet --data FOLDER [--depth 56] [--shares 0.9 0.8 0.7]
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.clock import time_ratios
from benchmarks.tables import markdown, write_results
from qcompress.budgets import LATENCY
from solvers import Solution, judge, solve

RATIOS = tuple(np.round(np.linspace(0.08, 0.92, 15), 3).tolist())
BISECTIONS = 7
RANDOM_CHOICES = 8
WIDE, WIDE_LAYERS, WIDE_BATCH = 1024, 6, 64
WIDE_RANKS = (32, 64, 128, 256, 384)
COLUMNS = {
    "network": "network",
    "choice": "chosen by",
    "macs": "macs",
    "predicted_time": "latency, predicted",
    "time": "processor time, measured",
    "wall": "wall time, measured",
    "predicted": "loss, predicted",
    "kl": "KL",
    "accuracy": "accuracy %",
}


class Wide(nn.Sequential):
    """Linear layers of equal width with ReLU in between."""

    def __init__(self) -> None:
        super().__init__(*(layer for _ in range(WIDE_LAYERS) for layer in (nn.Linear(WIDE, WIDE), nn.ReLU())))


def timed(model: nn.Module, measurement: qcompress.Measurement, batch: Tensor) -> qcompress.Measurement:
    """The measurement with times; prints how many options were timed and how long it took."""
    begun = time.perf_counter()
    with_times = qcompress.time_options(model, measurement, batch)
    whole_s, fixed = with_times.original[LATENCY], with_times.fixed[LATENCY]
    print(
        f"{len(with_times.parts)} layers, {len(with_times.cost)} options timed in {time.perf_counter() - begun:.0f} s: "
        f"{1000 * whole_s:.1f} ms a batch, {1000 * fixed:.1f} ms of them outside the layers",
        flush=True,
    )
    return with_times


def row(
    choice: str, solution: Solution, measurement: qcompress.Measurement, dense: nn.Module, batch: Tensor
) -> tuple[dict[str, Any], nn.Module]:
    """The row of a choice with its predicted and measured time, and its model."""
    smaller = qcompress.apply(dense, measurement, solution)
    return {
        "network": type(dense).__name__,
        "choice": choice,
        "macs": solution.usage["macs"] / measurement.original["macs"],
        "predicted_time": solution.usage[LATENCY] / measurement.original[LATENCY],
        **time_ratios(smaller, dense, batch),
        "predicted": solution.objective,
    }, smaller


def wide_rows() -> list[dict[str, Any]]:
    """The same rank in all layers of a network with random weights, for every rank."""
    model, batch = Wide().eval(), torch.randn(WIDE_BATCH, WIDE)
    measurement = timed(
        model,
        qcompress.measure(model, [batch], qcompress.low_rank(ranks=WIDE_RANKS, whitened=False), loss="mse"),
        batch,
    )
    problem = qcompress.formulate(measurement, {"macs": 1.0})
    choices = {label: np.array([option] * WIDE_LAYERS) for option, label in enumerate(problem.options[0])}
    return [
        row(f"all: {label}", judge(problem, uniform), measurement, model, batch)[0]
        for label, uniform in choices.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.9, 0.8, 0.7), help="of the dense latency")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    parser.add_argument("--time-limit", type=float, default=5, help="seconds for each solve")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    torch.set_num_threads(1)
    model = cifar.resnet(arguments.depth, folder)
    training, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, 512)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    reference, batch = cifar.logits(model, inputs), training[:128]
    options = qcompress.low_rank(ratios=RATIOS, kinds=("channels", "spatial", "tucker"), whitened=True)
    measurement = timed(model, qcompress.measure(model, cifar.batched(training), options), batch)
    rows: list[dict[str, Any]] = []

    def best(**budget: float) -> Solution:
        return solve(qcompress.formulate(measurement, budget), time_limit=arguments.time_limit, seed=0)

    def add(choice: str, solution: Solution) -> None:
        values, smaller = row(choice, solution, measurement, model, batch)
        output = cifar.logits(smaller, inputs)
        rows.append({**values, "kl": cifar.kl(reference, output), "accuracy": cifar.accuracy(output, labels)})
        print(rows[-1], flush=True)

    whole = qcompress.formulate(measurement, {"macs": 1.0})

    def macs_within(share: float) -> Solution | None:
        low, high, best_within = whole.minimum_usage()["macs"] / measurement.original["macs"], 1.0, None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            solution = best(macs=middle)
            if solution.choice is not None and solution.usage[LATENCY] <= share * measurement.original[LATENCY]:
                low, best_within = middle, solution
            else:
                high = middle
        return best_within

    add("dense", judge(whole, np.zeros(whole.num_groups, dtype=np.int64)))
    for share in arguments.shares:
        add(f"latency, at {share:g}", best(**{LATENCY: share}))
        within = macs_within(share)
        if within is not None:
            add(f"macs, within {share:g} of the latency", within)
        else:
            print(f"no choice for macs takes {share:g} of the latency or less")
    generator, sizes = np.random.default_rng(0), [len(options) for options in whole.options]
    for i in range(RANDOM_CHOICES):
        rows.append(row(f"random {i}", judge(whole, generator.integers(sizes)), measurement, model, batch)[0])  # noqa: PERF401
    rows += wide_rows()
    for network in dict.fromkeys(entry["network"] for entry in rows):
        off = [entry["time"] / entry["predicted_time"] for entry in rows if entry["network"] == network]
        spread = f"median {statistics.median(off):.3f}, {min(off):.3f} to {max(off):.3f}"
        print(f"{network}: measured / predicted time: {spread}")
    table = markdown(rows, COLUMNS)
    print(table)
    write_results(Path(arguments.out), f"latency_resnet{arguments.depth}", rows, table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
