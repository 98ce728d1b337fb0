"""Training for low rank before it is cut: the stable-rank penalty of BSR (arXiv 2111.15179) on ResNet-20.

Ranks are chosen by `beam_search` on the measured KL, as in BSR, at a share of the macs (plain factors of channels).
With the penalty, half of the training steps come before the cut, on the dense network, the other half after it; without
it all of them come after. Every row has the same ranks and as many steps of distillation from the original.

    python -m benchmarks.stable_rank --data FOLDER [--share 0.5] [--steps 100] [--strengths 1 10 100]
"""

import argparse
import dataclasses
from functools import partial
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--share", type=float, default=0.5, help="of the macs")
    parser.add_argument("--steps", type=int, default=100, help="of training in all, 128 images each")
    parser.add_argument("--strengths", type=float, nargs="+", default=(1, 10, 100), help="of the penalty")
    parser.add_argument("--test", type=int, default=2500, help="test images")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    model = cifar.resnet(20, folder)
    training = cifar.batched(cifar.images(folder, "cifar10_train4k_jpegsource")[0])
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
    reference = cifar.logits(model, inputs)
    measurement = qcompress.measure(
        model, training[:4], qcompress.low_rank(ratios=RATIOS, kinds=("channels",), whitened=False)
    )
    problem = qcompress.formulate(measurement, {"macs": arguments.share})
    true_loss = qcompress.TrueLoss(model, measurement, training[:2])
    choice = beam_search(problem, true_loss, max_measurements=150).choice
    assert choice is not None
    solution = judge(problem, choice)
    chosen = [own[i] for own, i in zip(measurement.transforms, choice, strict=True)]
    ranks = {
        part.modules[0]: own.ranks[0]
        for part, own in zip(measurement.parts, chosen, strict=True)
        if isinstance(own, LowRank)
    }
    tuned = partial(qcompress.finetune, data=training[:-4], teacher=model, validation=training[-4:])

    def cut(dense: nn.Module) -> nn.Module:
        own = dataclasses.replace(measurement, model_fingerprint=measurement.fingerprint_of(dense))
        return qcompress.apply(dense, own, solution)

    def beyond(dense: nn.Module) -> float:
        return float(qcompress.stable_rank(dense, ranks).detach()) / len(ranks)

    def row(name: str, dense: nn.Module, steps: int) -> dict[str, object]:
        factored = cut(dense)
        before, after = (cifar.logits(own, inputs) for own in (factored, tuned(factored, steps=steps)))
        found: dict[str, object] = {
            "penalty": name,
            "beyond": beyond(dense),
            "accuracy": cifar.accuracy(before, labels),
            "kl": cifar.kl(reference, before),
            "accuracy_tuned": cifar.accuracy(after, labels),
            "kl_tuned": cifar.kl(reference, after),
        }
        print(found, flush=True)
        return found

    print(f"original: {cifar.accuracy(reference, labels):.2f} %; ranks {ranks}")
    rows = [row("none", model, arguments.steps)]
    half = arguments.steps // 2
    for strength in arguments.strengths:
        dense = penalised(model, training[:-4], ranks, strength, half)
        rows.append(row(f"{strength:g}", dense, arguments.steps - half))
    columns = {
        "penalty": "penalty",
        "beyond": "singular values beyond the rank / within",
        "kl": "KL at the cut",
        "accuracy": "accuracy % at the cut",
        "kl_tuned": "KL, trained",
        "accuracy_tuned": "accuracy %, trained",
    }
    table = markdown(rows, columns)
    write_results(Path(arguments.out), "stable_rank", {"ranks": ranks, "rows": rows}, table)
    print(table)


def penalised(
    model: nn.Module, batches: list[torch.Tensor], ranks: dict[str, int], strength: float, steps: int
) -> nn.Module:
    """The dense network trained to meet the original's outputs with the penalty on top."""

    def penalty(own: nn.Module) -> torch.Tensor:
        return strength * qcompress.stable_rank(own, ranks)

    return qcompress.finetune(model, batches, steps, teacher=model, penalty=penalty)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
