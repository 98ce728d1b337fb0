"""SmolLM2-135M in bits per weight: are choices with pair terms better than the additive one, and by how much?

    python -m benchmarks.smollm2_pairs --model FOLDER --text FILE [--windows 64] [--length 64] [--judges 4]

Options, ties and test windows are those of `benchmarks.smollm2_hf`, with codes rounded to nearest. ``sampled`` takes
one column of the pair terms from every calibration window. At every budget the choice is made without pair terms, and
with them at half strength: between all layers, only between those of the same block, and as `qcompress.formulate`
counts them, by their share of signal. A row states the KL divergence from the float model on windows not calibrated
on, how far it is below that of the additive choice, and the standard error of this difference over the windows. An
interrupted run resumes.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

import qcompress
from benchmarks.found import found
from benchmarks.smollm2_gguf import windows
from benchmarks.smollm2_hf import BITS, SCHEMES, divergences, kept_outputs, measured
from benchmarks.tables import Rows, markdown, write_results
from formulations import PairTerms
from formulations.reductions.tie import tie
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.legal import for_engine
from qcompress.formulation import at_strength
from qcompress.measuring.pair_terms import PAIR_STRENGTH, consistent_rows
from qcompress.transforms.quantize.group_wise import GroupWise

NAME = "smollm2_pairs"
BUDGETS = (4.25, 3.5, 3.0)
CHOICES = ("additive", "pair terms", "pair terms within blocks", "pair terms by their signal")
LAYERS = 7  # of a block


def with_terms(problem: qcompress.Problem, measurement: qcompress.Measurement, choice: str) -> qcompress.Problem:
    """Return the additive problem with the pair terms that a choice is made with."""
    if choice == "additive":
        return problem
    if choice.endswith("signal"):
        return at_strength(problem, measurement, PAIR_STRENGTH)
    rows = consistent_rows(measurement.factor, measurement.cost) * PAIR_STRENGTH**0.5
    if not choice.endswith("blocks"):
        return problem.derived(pairs=PairTerms(factor=rows))
    block = problem.group_of // LAYERS
    kept = (block[:, None] == block) & (problem.group_of[:, None] != problem.group_of)
    return problem.derived(pairs=PairTerms(sparse=scipy.sparse.csr_array(np.triu(rows @ rows.T, 1) * kept)))


def between_layers(measurement: qcompress.Measurement) -> list[dict[str, Any]]:
    """Return correlations of the effects of two layers with the same option, and whether two halves agree on them.

    ``spread`` is the standard deviation of the correlations over pairs of layers, ``by_chance`` that of independent
    effects, and ``halves_agree`` the correlation between those from even and from odd windows.
    """
    first = np.cumsum([0, *map(len, measurement.transforms[:-1])])
    rows = []
    for scheme in ((3, None), (4, 64)):
        option = 1 + SCHEMES.index(scheme)
        effects = measurement.factor[[start + option for start in first if start + option < len(measurement.factor)]]
        pairs = np.triu_indices(len(effects), 1)
        within = pairs[0] // LAYERS == pairs[1] // LAYERS
        every, *halves = (np.asarray(np.corrcoef(part))[pairs] for part in (effects, effects[:, ::2], effects[:, 1::2]))
        for name, kept in (("all", within | True), ("within a block", within)):
            rows.append({
                "option": measurement.transforms[0][option].label, "pairs": name, "number": int(kept.sum()),
                "spread": float(every[kept].std()), "by_chance": effects.shape[1] ** -0.5,
                "halves_agree": float(np.corrcoef(halves[0][kept], halves[1][kept])[0, 1]),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2_pairs"), help="where everything is kept")
    parser.add_argument("--windows", type=int, default=64, help="windows to measure on")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument("--judges", type=int, default=4, help="windows of 512 tokens to judge on")
    words = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    data, judges = windows(words.model, words.text, words.windows)
    data, judges = [torch.cat(data)[:, : words.length]], judges[: words.judges]  # one batch: options are decoded once
    words.folder.mkdir(parents=True, exist_ok=True)
    transforms = [GroupWise(bits, 0.0, compensated=False, group_size=size) for bits, size in SCHEMES]
    engine = CompressedTensors()
    measurement, _ = measured(model, data, transforms, words.folder / f"{NAME}_{words.windows}_{words.length}.npz")
    legal, reference = for_engine(engine, model, measurement), kept_outputs(model, judges, words.folder / "outputs.npy")
    settings = {"windows": words.windows, "length": words.length, "judges": words.judges}
    rows = Rows(words.folder / "rows.json", settings)
    for bits in BUDGETS:
        for name in CHOICES:
            if rows.of(asked=bits, choice=name):
                continue
            problem = with_terms(qcompress.formulate(legal, {BITS: bits}, pairs=False), legal, name)
            tied = tie(problem, engine.ties(legal.parts))
            solved = qcompress.solve(tied.problem, "milp" if name == "additive" else "auto", time_limit=20)
            choice = tied.lift(found(solved).choice)
            smaller = qcompress.apply(model, legal, dataclasses.replace(solved, choice=choice))
            each = divergences(reference, smaller, judges)
            additive = rows.of(asked=bits, choice="additive")
            lower = np.array(additive[0]["each"] if additive else each) - each
            rows.add({
                "asked": bits, "choice": name, "predicted": solved.objective, "gap": solved.gap,
                "kl": float(np.mean(each)), "lower_by": float(lower.mean()),
                "error": float(lower.std(ddof=1) / len(lower) ** 0.5), "each": each,
            })  # fmt: skip
    rows_in_order = sorted(rows.values["rows"], key=lambda row: (-row["asked"], CHOICES.index(row["choice"])))
    for name, lines in ((NAME, rows_in_order), (f"{NAME}_halves", between_layers(legal))):
        table = markdown(lines, {key: key for key in lines[0] if key != "each"})
        write_results(words.folder, name, lines, table)
        print(f"{table}\n")


if __name__ == "__main__":
    main()
