"""SmolLM2-135M as a folder for transformers and vLLM: bits a layer chosen under a budget, against uniform bits.

    python -m benchmarks.smollm2_hf --model FOLDER --text FILE [--folder RUN] [--windows 24] [--compensated]

As `benchmarks.smollm2_gguf`, but written by engine compressed-tensors: FOLDER has the model in Hugging Face's form,
FILE has plain text, of which windows 200 to 215 judge. At 4.25, 3.5 and 3.0 bits a weight (with scales, of the layers
that have a choice: the vocabulary stays as it is) the choice of least predicted loss, q/k/v and gate/up tied, is
written, loaded by transformers and its logits compared with the emulation's; its KL divergence to the float model
stands beside that of the uniform scheme of as many bits.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

import qcompress
from benchmarks.smollm2_gguf import windows
from formulations.reductions.tie import tie
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.legal import for_engine
from qcompress.transforms.quantize.group_wise import GroupWise

BITS = "bits_per_weight"
UNIFORM = {4.25: (4, 64), 3.5: (3, 32), 3.0: (3, None)}  # bits a weight → bits, group size
SCHEMES = [(2, 64), (2, 32), (3, None), (3, 64), (3, 32), (4, 64), (5, 64), (6, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2_hf"), help="where everything is kept")
    parser.add_argument("--windows", type=int, default=24, help="windows to measure on")
    parser.add_argument("--compensated", action="store_true", help="codes that make up for each other")
    words = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    data, judges = windows(words.model, words.text, words.windows)
    words.folder.mkdir(parents=True, exist_ok=True)
    engine, start = CompressedTensors(tokenizer=str(words.model)), time.perf_counter()
    transforms = [GroupWise(bits, 0.0, words.compensated, group_size=size) for bits, size in SCHEMES]
    file = words.folder / f"measurement{'_compensated' if words.compensated else ''}_{words.windows}.npz"
    if file.exists():
        measurement = qcompress.Measurement.load(file)
    else:
        measurement = qcompress.measure(
            model, data, qcompress.Options(tuple(transforms)), method="sampled", cache=file.with_suffix(".part"),
            on_progress=lambda done: print(f"window {done.batches}, {done.elapsed_s:.0f} s", flush=True),
        )  # fmt: skip
        measurement.save(file)
        print(f"measured in {time.perf_counter() - start:.0f} s: {len(measurement.cost)} options", flush=True)
    legal = for_engine(engine, model, measurement)
    print("| bits a weight | choice | file bytes | predicted | gap | KL | logits differ by |", flush=True)
    print("|---|---|---|---|---|---|---|")

    def row(choice: str, bits: float, solution: qcompress.Solution, gap: float | None) -> None:
        smaller = qcompress.apply(model, legal, solution)
        written = qcompress.export(smaller, words.folder / f"{choice}_{bits}", target=engine)
        checked = qcompress.verify(written.path, smaller, judges[:1], target=engine)
        assert checked.ok, checked.why_not
        columns = (
            f"{solution.usage[BITS]:.3f}", choice, f"{written.size_bytes:,}", f"{solution.objective:.4f}",
            "–" if gap is None else f"{gap:.2%}", f"{qcompress.mean_loss(model, smaller, judges):.4f}",
            f"{checked.max_difference:g}",
        )  # fmt: skip
        print(f"| {' | '.join(columns)} |", flush=True)

    for bits, (each, size) in UNIFORM.items():
        problem = qcompress.formulate(legal, {BITS: bits + 0.1}, pairs=False)
        transform = GroupWise(each, 0.0, words.compensated, group_size=size)
        same = [options.index(transform) if transform in options else 0 for options in legal.transforms]
        alike = np.array([*same, *[0] * (len(problem.groups) - len(same))])
        judged = problem.evaluate(alike)
        uniform = qcompress.solve(problem, "greedy")
        row("uniform", bits, dataclasses.replace(
            uniform, choice=alike, objective=judged.objective, usage=judged.usage), None)  # fmt: skip
        tied = tie(qcompress.formulate(legal, {BITS: bits}, pairs=False), engine.ties(legal.parts))
        solved = qcompress.solve(tied.problem, "milp", time_limit=60)
        row("chosen", bits, dataclasses.replace(solved, choice=tied.lift(solved.choice)), solved.gap)


if __name__ == "__main__":
    main()
