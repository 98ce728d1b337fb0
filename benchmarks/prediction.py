"""How well measuring predicts: ResNet-20 on CIFAR-10, time in forward passes and rank correlation with the true KL.

Times are processor time of one run, relative to the quickest of three forward passes over the same images.
Random choices of 3 to 8 bits a layer: every choice draws its own range of bit-widths, then every layer one of them.
``--independent`` draws every layer from all of them, which is harder: such choices differ less.

    python -m benchmarks.prediction --data FOLDER
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

import qcompress
from benchmarks import cifar
from benchmarks.cifar10_resnet20 import STRENGTHS
from benchmarks.tables import markdown, write_results
from solvers import judge

BITS = (2, 3, 4, 5, 6, 7, 8)


def random_choices(count: int, num_layers: int, *, independent: bool) -> list[np.ndarray]:
    """Random choices as option indices: 0 is keep, 1 is 2 bits, and so on."""
    rng = np.random.default_rng(0)
    choices = []
    for _ in range(count):
        low, high = (2, 7) if independent else sorted(rng.integers(2, 8, size=2))
        choices.append(rng.integers(low, high + 1, size=num_layers))
    return choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--calibration", type=int, default=320, help="training images to measure and judge on")
    parser.add_argument("--choices", type=int, default=60, help="random choices")
    parser.add_argument("--independent", action="store_true", help="draw every layer from 3 to 8 bits on its own")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(20, folder)
    calibration, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, arguments.calibration)
    batches = cifar.batched(calibration, 64)
    reference = cifar.logits(model, calibration)
    options = qcompress.prune_quantize(bits=BITS, sparsity=(0,))

    rows, true = [], None
    for method in ("fisher", "direct"):
        forward_s = min(_forward_s(model, batches) for _ in range(3))
        start = time.process_time()
        measurement = qcompress.measure(model, batches, options, method=method)
        passes = (time.process_time() - start) / forward_s
        stated = {
            name: qcompress.formulate(measurement, {"bytes": 1.0}, pairs=strength)
            for name, strength in STRENGTHS.items()
        }
        choices = random_choices(arguments.choices, len(measurement.parts), independent=arguments.independent)
        if true is None:
            models = (qcompress.apply(model, measurement, judge(stated["additive"], choice)) for choice in choices)
            true = np.array([cifar.kl(reference, cifar.logits(smaller, calibration)) for smaller in models])
        for name, problem in stated.items():
            predicted = np.array([problem.evaluate(choice).objective for choice in choices])
            correlation = float(spearmanr(predicted, true)[0])
            rows.append({"method": method, "prediction": name, "spearman": correlation, "forward_passes": passes})
    columns = {
        "method": "measured by",
        "prediction": "prediction",
        "spearman": "Spearman",
        "forward_passes": "forward passes",
    }
    table = markdown(rows, columns)
    write_results(Path(arguments.out), "prediction_independent" if arguments.independent else "prediction", rows, table)
    print(table)


@torch.no_grad()
def _forward_s(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    start = time.process_time()
    for batch in batches:
        model(batch)
    return time.process_time() - start


if __name__ == "__main__":
    main()
