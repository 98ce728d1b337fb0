"""Codes that make up for each other, against codes rounded to nearest: ResNet-20 and ResNet-56 at uniform bits.

Every layer has the same bits and sparsity, in the same bytes, and nothing else is done to the network. In between is
rounding in order alone, as GPTQ and SparseGPT do it, with the scales refitted. Errors are of the layers' outputs on the
calibration images, relative and averaged; KL to the original and accuracy are on test images, seconds of one processor
for encoding all layers.

    python -m benchmarks.compensation --data FOLDER [--depth 56]
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import qcompress
from benchmarks import cifar
from benchmarks.tables import markdown, write_results
from qcompress.transforms.quantize import compensation as compensate
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

STORED = ((8, 0.0), (4, 0.0), (3, 0.0), (2, 0.0), (4, 0.5), (3, 0.5), (4, 0.75))
WAYS = ("to nearest", "in order", "compensated")
COLUMNS = {
    "stored": "stored",
    "way": "rounded",
    "error": "error of the outputs",
    "kl": "KL",
    "accuracy": "accuracy %",
    "cpu_s": "seconds",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--calibration", type=int, default=512, help="training images to measure on")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(arguments.depth, folder)
    calibration, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, arguments.calibration)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    reference = cifar.logits(model, inputs)
    print(f"original: {cifar.accuracy(reference, labels):.2f} % on {len(labels)} test images", flush=True)
    rows = []
    for bits, sparsity in STORED:
        options = qcompress.prune_quantize(bits=(bits,), sparsity=(sparsity,), compensated=True)
        measurement = qcompress.measure(model, cifar.batched(calibration), options)
        problem = qcompress.formulate(measurement, {"bytes": 1.0})
        solution = qcompress.solve(problem.with_budgets(bytes=problem.minimum_usage()["bytes"]), "brute-force")
        for way in WAYS:
            transform = PruneQuantize(bits, sparsity, compensated=way != "to nearest")
            transforms = tuple((options[0], *[transform] * (len(options) - 1)) for options in measurement.transforms)
            stated = replace(measurement, transforms=transforms)
            with patch.object(compensate, "ROUNDS", 0 if way == "in order" else compensate.ROUNDS):
                begun = time.process_time()
                smaller = qcompress.apply(model, stated, solution)
                seconds = time.process_time() - begun
            errors = [
                weight.relative_error(part.weight(smaller))
                for part, weight in zip(measurement.parts, measurement.weights(model), strict=True)
            ]
            output = cifar.logits(smaller, inputs)
            row = {"stored": transform.nearest.label, "way": way, "error": float(np.mean(errors)), "cpu_s": seconds}
            rows.append(row | {"kl": cifar.kl(reference, output), "accuracy": cifar.accuracy(output, labels)})
            print(rows[-1], flush=True)
    table = markdown(rows, COLUMNS)
    write_results(Path(arguments.out), f"compensation_resnet{arguments.depth}", {"rows": rows}, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
