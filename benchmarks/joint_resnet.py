"""Joint choice of rank, sparsity and bits for ResNet-20 and ResNet-56, against each family alone at equal bytes.

One measurement of the joint options serves all families, and the joint solve starts from the best family's choice
(`benchmarks.families`), so that it is never worse in predicted loss; the true KL and the accuracy say whether that
holds there too. All choices are judged before and after the same fine-tuning (distillation from the original on
training images). The calibration images are the first of those; on some of them fine-tuning picks its best weights.
Then the joint choice and that of the best family are measured again around and chosen again by the true KL on the
calibration images (`qcompress.refine`, `--rounds`).

Rows are written as they come: an interrupted run resumes when it is started again with the same settings
(after a change of the code delete the files of the results).

    python -m benchmarks.joint_resnet --data FOLDER [--depth 56] [--bits 4 3 2.5 2] [--steps 50] [--rounds 2]
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.families import Choice, measured, refine_families, solve_families
from benchmarks.tables import Rows, markdown, write_results
from formulations import Problem
from qcompress import low_rank, prune_quantize
from solvers import Solution

CALIBRATION = 512  # training images
VALIDATED = 256  # of them, to pick the best weights of fine-tuning on
RANKS = low_rank(ratios=(0.1, 0.25, 0.5, 0.75), kinds=("channels", "spatial"), whitened=True)
OFFERED = (
    prune_quantize(bits=(2, 3, 4, 6, 8), sparsity=(0,), compensated=True)
    + prune_quantize(bits=(3, 4), sparsity=(0.5, 0.75, 0.9), compensated=True)
    + prune_quantize(bits=(2,), sparsity=(0.75,), compensated=True)
    + RANKS
    + RANKS.then(prune_quantize(bits=(3, 4, 6), sparsity=(0,), compensated=True))
    + RANKS.then(prune_quantize(bits=(4,), sparsity=(0.5,), compensated=True))
)
COLUMNS = {
    "bits": "average bits",
    "choice": "options",
    "bytes": "bytes",
    "predicted": "predicted",
    "gap": "proven gap",
    "rounds": "rounds",
    "kl_calibration": "KL, calibration",
    "kl": "KL, test",
    "accuracy": "accuracy %",
    "kl_calibration_tuned": "KL, calibration, tuned",
    "kl_tuned": "KL, test, tuned",
    "accuracy_tuned": "accuracy %, tuned",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """Judges a smaller network before and after fine-tuning."""

    original: nn.Module
    training: Tensor
    inputs: Tensor
    labels: Tensor
    steps: int

    @functools.cached_property
    def seen(self) -> Tensor:
        """The calibration images."""
        return self.training[:CALIBRATION]

    @functools.cached_property
    def references(self) -> tuple[Tensor, Tensor]:
        """The original's outputs on the calibration images and on the test images."""
        return cifar.logits(self.original, self.seen), cifar.logits(self.original, self.inputs)

    def worth(self, smaller: nn.Module) -> dict[str, float]:
        """KL on calibration and test images and accuracy on test images, before and after fine-tuning."""
        worth = self._worth(smaller)
        if self.steps:
            batches, seen = cifar.batched(self.training), cifar.batched(self.seen[:VALIDATED])
            tuned = qcompress.finetune(smaller, batches, self.steps, teacher=self.original, validation=seen)
            worth |= {f"{name}_tuned": value for name, value in self._worth(tuned).items()}
        return worth

    def _worth(self, smaller: nn.Module) -> dict[str, float]:
        seen, output = cifar.logits(smaller, self.seen), cifar.logits(smaller, self.inputs)
        return {
            "kl_calibration": cifar.kl(self.references[0], seen),
            "kl": cifar.kl(self.references[1], output),
            "accuracy": cifar.accuracy(output, self.labels),
        }


def verdict(rows: list[dict[str, Any]]) -> str:
    """For each number, whether the joint choice or which family has the smallest value at one budget."""
    fitting = {row["choice"]: row for row in rows if "bytes" in row}
    said = []
    for key in COLUMNS:
        if fitting and key.startswith(("predicted", "kl")) and all(key in row for row in fitting.values()):
            best = min(fitting, key=lambda choice: fitting[choice][key])
            said.append(f"{COLUMNS[key]}: {best} {fitting[best][key]:.4g}")
    return f"{rows[0]['bits']:g} bits, least {'; '.join(said)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where the measurement, JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--bits", type=float, nargs="+", default=(4, 3, 2.5, 2), help="budgets: of 32, of all bytes")
    parser.add_argument("--steps", type=int, default=50, help="of fine-tuning, 128 images each; 0 for none")
    parser.add_argument("--rounds", type=int, default=2, help="of measuring and choosing again; 0 for none")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve")
    arguments = parser.parse_args()
    folder, out = cifar.data_folder(arguments), Path(arguments.out)
    model = cifar.resnet(arguments.depth, folder)
    training, _ = cifar.images(folder, "cifar10_train4k_jpegsource")
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    judge = Judge(original=model, training=training, inputs=inputs, labels=labels, steps=arguments.steps)
    accuracy = cifar.accuracy(judge.references[1], labels)
    print(f"original: {accuracy:.2f} % on {len(labels)} test images", flush=True)

    name, data = f"joint_resnet{arguments.depth}", cifar.batched(judge.seen)
    measurement = measured(out, name, OFFERED, lambda options: qcompress.measure(model, data, options))
    settings = {"original": accuracy, "offered": OFFERED.to_json(), "calibration": CALIBRATION}
    settings |= {key: getattr(arguments, key) for key in ("depth", "steps", "test", "time_limit")}
    rows = Rows(out / f"{name}.json", settings)

    def worth(solution: Solution) -> dict[str, float]:
        return judge.worth(qcompress.apply(model, measurement, solution))

    def refine(current: qcompress.Measurement, problem: Problem, choice: Choice) -> qcompress.Refined:
        limit = arguments.time_limit
        return qcompress.refine(model, data, current, problem, choice, rounds=arguments.rounds, time_limit=limit)

    for bits in arguments.bits:
        problem = qcompress.formulate(measurement, {"bytes": bits / 32})
        solutions = solve_families(rows, {"bits": bits}, problem, measurement, worth, time_limit=arguments.time_limit)
        if arguments.rounds:
            refine_families(rows, {"bits": bits}, problem, measurement, worth, solutions, refine)
        print(verdict(rows.of(bits=bits)), flush=True)

    table = markdown([row for bits in arguments.bits for row in rows.of(bits=bits)], COLUMNS)
    write_results(out, name, rows.values, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
