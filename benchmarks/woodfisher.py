"""One-shot unstructured pruning of ResNet-20 and ResNet-56 at equal numbers of zeros: WoodFisher and this project.

Nothing is trained afterwards. The weights with the smallest scores are removed, the same share of every layer or ranked
over all layers. Scores are the magnitude; ``½ F_ii w_i²`` of the diagonal empirical Fisher matrix; and WoodFisher's
``½ w_i² / [H⁻¹]_ii`` (arXiv 2004.14340), without and with the update of the kept weights, which is solved for all
removals of a block together (`benchmarks.surgeon`). Gradients are those of the cross entropy of single calibration
images with their labels. Their size depends on the images, so that the default damping is a share of the mean of the
Fisher matrix's diagonal; the second table varies it. This project: ``prune_quantize`` at 16
bits, which removes by magnitude, at the same sparsity in every layer; and ``compress``, which chooses from `OFFERED`
within the bytes of the uniform choice. At 16 bits bytes follow from the number of zeros alone, so this is equal, too.

KL to the original and accuracy are on test images (JPEG) and on lossless training images of the network; neither are
used for calibration. Rows are written one by one: an interrupted run resumes.

    python -m benchmarks.woodfisher --data FOLDER [--depth 56] [--source lossless jpeg]
"""

import argparse
import copy
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.surgeon import Fisher, Layers, kept_in_all, kept_in_each, per_sample_gradients
from benchmarks.tables import Rows, markdown, write_results
from benchmarks.trust_cases import IMAGES
from qcompress.measurement import Measurement
from solvers import judge

RANKINGS = {"uniform": kept_in_each, "global": kept_in_all}
MAGNITUDE, DIAGONAL, PLAIN, UPDATED = "magnitude", "diagonal Fisher", "WoodFisher", "WoodFisher, updated"
SCORED = (MAGNITUDE, DIAGONAL, PLAIN, UPDATED)
OURS = {"prune_quantize, to nearest": False, "prune_quantize, compensated": True}
OFFERED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96)  # sparsities that `compress` chooses from
SPARSITIES, DAMPED_AT = (0.5, 0.6, 0.7, 0.8, 0.9), 0.8
DAMPINGS = tuple(10.0**power for power in range(-7, 0))
UNSEEN = slice(2000, 2500)  # of the lossless images
COLUMNS = {
    "source": "calibrated on",
    "method": "method",
    "ranking": "ranking",
    "damping": "damping",
    "share": "share of the mean diagonal",
    "sparsity": "sparsity",
    "zeros": "zeros",
    "kl": "KL",
    "accuracy": "accuracy %",
    "kl_lossless": "KL, lossless",
    "accuracy_lossless": "accuracy %, lossless",
}


class Study:
    """The network with what is known of it from one source of calibration images."""

    def __init__(self, arguments: argparse.Namespace, source: str, place: Path) -> None:
        folder = cifar.data_folder(arguments)
        self.arguments, self.place = arguments, place
        self.model = cifar.resnet(arguments.depth, folder)
        self.weights = {name: value for name, value in self.model.named_parameters() if value.ndim > 1}
        self.inputs, self.labels = cifar.images(folder, IMAGES[source], 0, arguments.calibration)
        tested = cifar.images(folder, "cifar10_test_jpegsource", 0, arguments.test)
        unseen = cifar.images(folder, IMAGES["lossless"], UNSEEN.start, UNSEEN.stop)
        self.judged = {"": tested, "_lossless": unseen}
        self.references = {name: outputs(self.model, inputs) for name, (inputs, _) in self.judged.items()}

    @functools.cached_property
    def fisher(self) -> Fisher:
        fisher = Fisher(self.weights, self.arguments.block)
        for gradients in per_sample_gradients(self.model, list(self.weights), self.inputs, self.labels):
            fisher.add(gradients)
        return fisher

    def damping(self, cell: Mapping[str, Any]) -> dict[str, float]:
        """Return the damping of a row and its share of the mean diagonal; empty for rows without damping."""
        if cell["method"] not in (PLAIN, UPDATED):
            return {}
        mean = self.fisher.mean_diagonal()
        damping = cell.get("damping") or self.arguments.damping * mean
        return {"damping": damping, "share": damping / mean}

    def made(self, method: str, ranking: str, sparsity: float, damping: float = 0.0, **_: Any) -> nn.Module:
        """Return the pruned network of a row."""
        if method in OURS:
            return self.ours(method, ranking, sparsity)
        return self.pruned(method, ranking, sparsity, damping)

    @functools.lru_cache(maxsize=1)  # noqa: B019  # as long as the study
    def scores(self, method: str, damping: float) -> Layers:
        """Scores of all weights; the lowest are removed first."""
        if method == MAGNITUDE:
            return {name: weight.abs().flatten() for name, weight in self.weights.items()}
        return self.fisher.diagonal_scores() if method == DIAGONAL else self.fisher.scores(damping)

    def pruned(self, method: str, ranking: str, sparsity: float, damping: float) -> nn.Module:
        """Return the network pruned by scores."""
        kept = RANKINGS[ranking](self.scores(PLAIN if method == UPDATED else method, damping), sparsity)
        if method == UPDATED:
            return self.with_weights(self.fisher.updated(kept, damping))
        return self.with_weights({name: weight.flatten() * kept[name] for name, weight in self.weights.items()})

    @torch.no_grad()
    def with_weights(self, weights: Layers) -> nn.Module:
        """Return a copy of the network with other weights."""
        smaller = copy.deepcopy(self.model)
        for name, weight in weights.items():
            parameter = smaller.get_parameter(name)
            parameter.copy_(weight.view_as(parameter))
        return smaller

    @functools.cache  # noqa: B019  # as long as the study
    def measured(self, method: str) -> Measurement:
        options = qcompress.prune_quantize(bits=(16,), sparsity=SPARSITIES, compensated=OURS[method])
        return qcompress.measure(self.model, cifar.batched(self.inputs), options)

    def ours(self, method: str, ranking: str, sparsity: float) -> nn.Module:
        """Return the network with that sparsity in every layer, or as chosen by `compress` within the same bytes."""
        measurement = self.measured(method)
        problem = qcompress.formulate(measurement, {"bytes": 1.0})
        uniform = judge(
            problem,
            [[getattr(option, "sparsity", None) for option in own].index(sparsity) for own in measurement.transforms],
        )
        if ranking == "uniform":
            return qcompress.apply(self.model, measurement, uniform)
        options = qcompress.prune_quantize(bits=(16,), sparsity=OFFERED, compensated=OURS[method])
        return qcompress.compress(
            self.model, cifar.batched(self.inputs), budget={"bytes": uniform.usage["bytes"]}, options=options,
            time_limit=self.arguments.time_limit, folder=self.place / ("compensated" if OURS[method] else "nearest"),
        ).model  # fmt: skip

    def worth(self, smaller: nn.Module) -> dict[str, float]:
        """Return the share of zeros, and KL and accuracy on the images that were not used."""
        pruned = [smaller.get_parameter(name) for name in self.weights]
        zeros = sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)
        worth: dict[str, float] = {"zeros": zeros}
        for name, (inputs, labels) in self.judged.items():
            output = outputs(smaller, inputs)
            worth[f"kl{name}"] = cifar.kl(self.references[name], output)
            worth[f"accuracy{name}"] = cifar.accuracy(output, labels)
        return worth


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs for all images, in batches that fit into the processor's cache."""
    return torch.cat([cifar.logits(model, batch) for batch in cifar.batched(inputs)])


def cells() -> Iterator[dict[str, Any]]:
    """Yield what the rows of one source are about."""
    for method, sparsity in itertools.product((*SCORED, *OURS), SPARSITIES):
        for ranking in ("uniform", "compress" if method in OURS else "global"):
            yield {"table": "sparsity", "method": method, "ranking": ranking, "sparsity": sparsity}
    for damping, method in itertools.product(DAMPINGS, (PLAIN, UPDATED)):
        yield {"table": "damping", "method": method, "ranking": "global", "damping": damping, "sparsity": DAMPED_AT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the network")
    parser.add_argument("--source", nargs="+", choices=tuple(IMAGES), default=("lossless",), help="to calibrate on")
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--block", type=int, default=512, help="weights of a block of the Fisher matrix")
    parser.add_argument("--damping", type=float, default=0.05, help="share of the mean diagonal")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve of `compress`")
    arguments = parser.parse_args()
    out, name = Path(arguments.out), f"woodfisher_resnet{arguments.depth}"
    keys = ("depth", "calibration", "block", "damping", "test", "time_limit")
    rows = Rows(out / f"{name}.json", {key: getattr(arguments, key) for key in keys})
    for source in arguments.source:
        study: Study | None = None
        for cell in cells():
            if not rows.of(source=source, **cell):
                study = study or Study(arguments, source, out / f"{name}_{source}")
                cell |= study.damping(cell)
                rows.add({"source": source, **cell, **study.worth(study.made(**cell))})
    table = "\n\n".join(markdown(rows.of(table=table), COLUMNS) for table in ("sparsity", "damping"))
    write_results(out, name, rows.values, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
