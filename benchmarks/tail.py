"""The long tail: does a loss with more weight on unsure samples change fewer of their answers at equal bytes?

    python -m benchmarks.tail --data FOLDER [--losses kl kl-tail kl-tail:4] [--bits 3 2.5] [--draws 2] [--test 2500]

ResNet-20 on CIFAR-10 with compensated codes of 2 to 8 bits. For each loss, average number of bits and disjoint draw of
calibration images, bits are chosen within the bytes of that average. Two sets of test images are counted separately:
the fifth with the smallest margin of the original network, and those on which ResNet-20 and ResNet-56 disagree. Each
row is written when it is done; an interrupted run resumes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qcompress
from benchmarks import cifar
from benchmarks.cifar10_resnet20 import BITS, bits_budget
from benchmarks.tables import Rows, markdown, write_results
from solvers import solve

TAIL = 0.2
COLUMNS = {
    "bits": "average bits",
    "draw": "draw",
    "loss": "chosen by",
    "tail": "changed in the tail",
    "disagreed": "changed where ResNet-56 disagrees",
    "head": "changed elsewhere",
    "accuracy": "accuracy",
    "kl": "KL",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--losses", nargs="+", default=["kl", "kl-tail", "kl-tail:4"])
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 2.5])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--calibration", type=int, default=512, help="images of a draw")
    parser.add_argument("--test", type=int, default=2500)
    parser.add_argument("--time-limit", type=float, default=3.0)
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    settings = {"test": arguments.test, "calibration": arguments.calibration, "time_limit": arguments.time_limit}
    rows = Rows(arguments.out / "tail_rows.json", settings)
    model = cifar.resnet(20, folder)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    reference, deeper = cifar.logits(model, inputs), cifar.logits(cifar.resnet(56, folder), inputs)
    parts = parts_of(reference, deeper)
    for draw in range(arguments.draws):
        for loss in arguments.losses:
            missing = [bits for bits in arguments.bits if not rows.of(draw=draw, loss=loss, bits=bits)]
            if not missing:
                continue
            start = draw * arguments.calibration
            images, _ = cifar.images(folder, "cifar10_train4k_jpegsource", start, start + arguments.calibration)
            options = qcompress.prune_quantize(bits=BITS, sparsity=(0,), compensated=True)
            measurement = qcompress.measure(model, cifar.batched(images), options, loss=loss)
            stated = qcompress.formulate(measurement, {"bytes": 1.0})
            for bits in missing:
                problem = qcompress.formulate(measurement, {"bytes": bits_budget(stated, bits)})
                solution = solve(problem, time_limit=arguments.time_limit, seed=0)
                output = cifar.logits(qcompress.apply(model, measurement, solution), inputs)
                changed = output.argmax(1) != reference.argmax(1)
                row: dict[str, Any] = {"bits": bits, "draw": draw, "loss": loss, "bytes": solution.usage["bytes"]}
                row |= {name: int(changed[part].sum()) for name, part in parts.items()}
                row |= {"accuracy": cifar.accuracy(output, labels), "kl": cifar.kl(reference, output)}
                rows.add(row)
    shown = sorted(rows.values["rows"], key=lambda row: (-row["bits"], row["draw"], row["loss"]))
    table = markdown(shown, COLUMNS)
    print({name: int(part.sum()) for name, part in parts.items()})
    print(table)
    write_results(arguments.out, "tail", shown, table)


def parts_of(reference: Tensor, deeper: Tensor) -> dict[str, Tensor]:
    """Return masks of the images: in the tail by margin, disagreed on by the deeper network, and neither."""
    top = reference.log_softmax(1).topk(2, dim=1).values
    margin = (top[:, 0] - top[:, 1]).numpy()
    tail = torch.from_numpy(margin <= np.quantile(margin, TAIL))
    disagreed = reference.argmax(1) != deeper.argmax(1)
    return {"tail": tail, "disagreed": disagreed, "head": ~tail & ~disagreed}


if __name__ == "__main__":
    main()
