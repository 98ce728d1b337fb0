"""Training for low rank before it is cut: the stable-rank penalty of BSR (arXiv 2111.15179) on ResNet-20.

Ranks are chosen by `beam_search` on the measured KL, as in BSR, at a share of the macs (plain factors of channels).
With the penalty, half of the training steps come before the cut, on the dense network, the other half after it; without
it all of them come after. Every row has the same ranks and as many steps of distillation from the original.

    python -m benchmarks.stable_rank --data FOLDER [--share 0.5] [--steps 100] [--strengths 1 10 100]
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

import qcompress
from benchmarks import cifar
from benchmarks.tables import markdown, write_results
from qcompress.transforms.low_rank.factors import LowRank
from solvers import beam_search, judge

RATIOS = tuple(np.round(np.linspace(0.1, 0.9, 17), 3).tolist())


COLUMNS = {
    "penalty": "penalty",
    "beyond": "singular values beyond the rank / within",
    "kl": "KL at the cut",
    "accuracy": "accuracy % at the cut",
    "kl_tuned": "KL, trained",
    "accuracy_tuned": "accuracy %, trained",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """The network, the ranks to cut it to, and the data for training and judging."""

    model: nn.Module
    measurement: qcompress.Measurement
    solution: qcompress.Solution
    ranks: dict[str, int]
    training: list[torch.Tensor]
    inputs: torch.Tensor
    labels: torch.Tensor

    def row(self, name: str, dense: nn.Module, steps: int) -> dict[str, object]:
        """The row of a dense network: judged right after the cut and after ``steps`` steps of training."""
        measured = dataclasses.replace(self.measurement, model_fingerprint=self.measurement.fingerprint_of(dense))
        factored = qcompress.apply(dense, measured, self.solution)
        tuned = qcompress.finetune(
            factored, self.training[:-4], steps, teacher=self.model, validation=self.training[-4:]
        )
        beyond = float(qcompress.stable_rank(dense, self.ranks).detach()) / len(self.ranks)
        after = {f"{key}_tuned": value for key, value in self.judged(tuned).items()}
        row = {"penalty": name, "beyond": beyond, **self.judged(factored), **after}
        print(row, flush=True)
        return row

    def judged(self, model: nn.Module) -> dict[str, float]:
        """KL and accuracy on the test images."""
        output, reference = cifar.logits(model, self.inputs), cifar.logits(self.model, self.inputs)
        return {"kl": cifar.kl(reference, output), "accuracy": cifar.accuracy(output, self.labels)}


def main() -> None:
    arguments = _arguments()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(20, folder)
    training = cifar.batched(cifar.images(folder, "cifar10_train4k_jpegsource")[0])
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    options = qcompress.low_rank(ratios=RATIOS, kinds=("channels",), whitened=False)
    measurement = qcompress.measure(model, training[:4], options)
    problem = qcompress.formulate(measurement, {"macs": arguments.share})
    true_loss = qcompress.TrueLoss(model, measurement, training[:2])
    choice = beam_search(problem, true_loss, max_measurements=150).choice
    assert choice is not None
    chosen = [options[i] for options, i in zip(measurement.transforms, choice, strict=True)]
    ranks = {
        part.modules[0]: transform.ranks[0]
        for part, transform in zip(measurement.parts, chosen, strict=True)
        if isinstance(transform, LowRank)
    }
    study = Study(
        model=model,
        measurement=measurement,
        solution=judge(problem, choice),
        ranks=ranks,
        training=training,
        inputs=inputs,
        labels=labels,
    )
    print(f"original: {cifar.accuracy(cifar.logits(model, inputs), labels):.2f} %; ranks {ranks}")
    rows, half = [study.row("none", model, arguments.steps)], arguments.steps // 2
    for strength in arguments.strengths:
        dense = penalised(model, training[:-4], ranks, strength, half)
        rows.append(study.row(f"{strength:g}", dense, arguments.steps - half))
    table = markdown(rows, COLUMNS)
    write_results(Path(arguments.out), "stable_rank", {"ranks": ranks, "rows": rows}, table)
    print(table)


def penalised(
    model: nn.Module, batches: list[torch.Tensor], ranks: dict[str, int], strength: float, steps: int
) -> nn.Module:
    """The dense network, trained on the distance to the original's outputs plus the penalty."""

    def penalty(network: nn.Module) -> torch.Tensor:
        return strength * qcompress.stable_rank(network, ranks)

    return qcompress.finetune(model, batches, steps, teacher=model, penalty=penalty)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--share", type=float, default=0.5, help="of the macs")
    parser.add_argument("--steps", type=int, default=100, help="of training in all, 128 images each")
    parser.add_argument("--strengths", type=float, nargs="+", default=(1, 10, 100), help="of the penalty")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
