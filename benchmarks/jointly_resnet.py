"""Channels, bits and ranks of a ResNet chosen jointly, against one after the other, at equal bytes and macs.

Jointly: `compress` with `prune_channels` and `prune_quantize` on offer together, under budgets for bytes and macs.
The same in two rounds: the second one measures again in the network that the first has made smaller. With ranks:
`low_rank` is on offer as well, and in one row `low_rank` and `prune_quantize` without channels.
One after the other: channels are removed until the macs fit, then the bits of what is left are chosen until the bytes
fit. With a budget for bytes only, the alternatives are bits alone, and channels first to a share of the bytes. All runs
see the same images, compensate in the same way, and are judged on test images.

The rows are kept in ``--out``; an interrupted run resumes.

    python -m benchmarks.jointly_resnet --data FOLDER [--depth 20] [--macs 0.7 0.5 1] [--bytes 0.12 0.07 0.07]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcompress
from benchmarks import cifar
from benchmarks.tables import Rows, markdown, write_results
from formulations import InfeasibleBudgetError
from qcompress import Options
from qcompress.model.counting import count

JOINTLY, FIRST_CHANNELS, BITS_ONLY = "jointly", "channels, then bits", "bits only"
IN_ROUNDS, WITH_RANKS, NO_CHANNELS = "jointly, two rounds", "jointly, with ranks", "ranks and bits, no channels"
SHARES = (0.75, 0.5)
"""Shares of the bytes that channels are removed to first, if the budget is for bytes only."""

COLUMNS = {
    "macs_share": "macs allowed",
    "bytes_share": "bytes allowed",
    "choice": "chosen",
    "macs": "macs",
    "bytes": "bytes",
    "gap": "gap",
    "kl": "KL",
    "accuracy": "accuracy %",
}


class Study:
    """The network and the images."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = cifar.data_folder(arguments)
        self.arguments, self.folder = arguments, Path(arguments.out)
        self.model = cifar.resnet(arguments.depth, folder)
        self.data = cifar.batched(cifar.images(folder, "cifar10_train4k_jpegsource", 0, arguments.calibration)[0], 64)
        self.inputs, self.labels = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
        self.reference = cifar.logits(self.model, self.inputs)
        self.whole_macs = count(self.model, self.data[:1], None).macs
        self.channels = qcompress.prune_channels(keep=arguments.keep)
        self.codes = qcompress.prune_quantize(bits=arguments.bits, sparsity=(0,), compensated=True)
        factor_codes = qcompress.prune_quantize(bits=arguments.factor_bits, sparsity=(0,), compensated=True)
        self.ranks = qcompress.low_rank(ratios=arguments.ratios).then(factor_codes)

    def compressed(
        self, name: str, model: nn.Module, budget: dict[str, Any], options: Options, rounds: int = 1
    ) -> qcompress.Result:
        """Return the result of one `qcompress.compress`, whose steps are kept in a folder of that name."""
        kept, limit = self.folder / f"jointly_resnet{self.arguments.depth}_{name}", self.arguments.time_limit
        return qcompress.compress(
            model, self.data, budget=budget, options=options, rounds=rounds, time_limit=limit, folder=kept
        )

    def row(self, macs: float, size: float, choice: str) -> dict[str, Any]:
        """Return the row of one way of choosing at one pair of budgets, as shares of the original's."""
        in_bytes = self.bytes_of(size)
        budget = {"bytes": in_bytes} | ({"macs": macs} if macs < 1 else {})
        if choice == JOINTLY:
            result = self.compressed("jointly", self.model, budget, self.channels + self.codes)
        elif choice == IN_ROUNDS:
            result = self.compressed("in_rounds", self.model, budget, self.channels + self.codes, rounds=2)
        elif choice == WITH_RANKS:
            result = self.compressed("with_ranks", self.model, budget, self.channels + self.codes + self.ranks)
        elif choice == NO_CHANNELS:
            result = self.compressed("ranks", self.model, budget, self.codes + self.ranks)
        elif choice == BITS_ONLY:
            result = self.compressed("bits", self.model, budget, self.codes)
        else:
            to = {"macs": macs} if choice == FIRST_CHANNELS else {"bytes": float(choice.split()[2].rstrip(","))}
            first = self.compressed("channels", self.model, to, self.channels)
            ((resource, share),) = to.items()
            result = self.compressed(f"bits_after_{share}_{resource}", first.model, {"bytes": in_bytes}, self.codes)
        output = cifar.logits(result.model, self.inputs)
        return {
            "macs_share": macs,
            "bytes_share": size,
            "choice": choice,
            "macs": count(result.model, self.data[:1], None).macs / self.whole_macs,
            "bytes": qcompress.compressed_size(result.model).payload_bytes,
            "gap": result.report.gap,
            "kl": cifar.kl(self.reference, output),
            "accuracy": cifar.accuracy(output, self.labels),
        }

    def bytes_of(self, share: float) -> int:
        """Return a share of the original's bytes."""
        return int(share * sum(tensor.nbytes for tensor in self.model.state_dict().values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--macs", type=float, nargs="+", default=(0.7, 0.5, 1.0), help="shares that may stay")
    parser.add_argument(
        "--bytes", type=float, nargs="+", default=(0.12, 0.07, 0.07), help="shares, one for each of macs"
    )
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--keep", type=float, nargs="+", default=(0.875, 0.75, 0.625, 0.5, 0.375, 0.25))
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.25, 0.5, 0.75), help="of ranks")
    parser.add_argument("--factor-bits", type=int, nargs="+", default=(4, 6))
    parser.add_argument("--test", type=int, default=2500, help="test images")
    parser.add_argument("--time-limit", type=float, default=30, help="seconds for each solve")
    arguments = parser.parse_args()
    study, name = Study(arguments), f"jointly_resnet{arguments.depth}"
    original = cifar.accuracy(study.reference, study.labels)
    of_all = ("depth", "calibration", "keep", "bits", "ratios", "factor_bits", "test", "time_limit")
    settings = {key: getattr(arguments, key) for key in of_all}
    rows = Rows(study.folder / f"{name}.json", {"original": original, **settings})
    for macs, size in zip(arguments.macs, arguments.bytes, strict=True):
        others = [FIRST_CHANNELS] if macs < 1 else [BITS_ONLY, *(f"channels to {share}, then bits" for share in SHARES)]
        for choice in (JOINTLY, IN_ROUNDS, WITH_RANKS, NO_CHANNELS, *others):
            if not rows.of(macs_share=macs, bytes_share=size, choice=choice):
                try:
                    rows.add(study.row(macs, size, choice))
                except InfeasibleBudgetError as error:
                    rows.add(
                        {"macs_share": macs, "bytes_share": size, "choice": choice, "infeasible": str(error)[:100]}
                    )
    table = markdown(rows.of(), COLUMNS)
    write_results(study.folder, name, rows.values, table)
    print(f"original: {original:.2f} % on {len(study.labels)} test images\n{table}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
