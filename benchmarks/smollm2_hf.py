"""SmolLM2-135M as a folder for transformers and vLLM: bits chosen per layer under a budget, against uniform bits.

    python -m benchmarks.smollm2_hf --model FOLDER --text FILE [--folder RUN] [--windows 24] [--compensated]

Like `benchmarks.smollm2_gguf`, but with the engine compressed-tensors. FOLDER has the model in Hugging Face's format;
FILE has plain text, whose windows 200 to 215 are the test data. Budgets are 4.25, 3.5 and 3.0 bits per weight, counting
scales, over the layers that have a choice (the vocabulary is unchanged). The choice of least predicted loss, with q/k/v
and gate/up tied, is written and loaded by transformers, and its logits are compared with the emulation's on 64 tokens.
Its KL divergence from the float model is compared with that of the uniform scheme with the same number of bits. One
backward pass per window is too little for pair terms, so the choice is additive. An interrupted run resumes.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qcompress
from benchmarks.smollm2_gguf import LENGTH, windows
from benchmarks.tables import Rows, markdown, write_results
from formulations.files import drafting, read_json, write_json
from formulations.reductions.tie import tie
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.legal import for_engine
from qcompress.engines.verify import checked
from qcompress.transforms.base import Target, Transform
from qcompress.transforms.quantize.group_wise import GroupWise

NAME = "smollm2_hf"
BITS = "bits_per_weight"
UNIFORM = {4.25: (4, 64), 3.5: (3, 32), 3.0: (3, None)}  # bits a weight → bits, group size
SCHEMES = [(2, 64), (2, 32), (3, None), (3, 64), (3, 32), (4, 64), (5, 64), (6, 64)]


def measured(
    model: torch.nn.Module, data: list[torch.Tensor], transforms: list[GroupWise], file: Path
) -> tuple[qcompress.Measurement, float]:
    """Return the measurement and the processor time in seconds that it took, from files if they exist."""
    times = file.with_suffix(".json")
    if not file.exists():
        start = time.process_time()
        measurement = qcompress.measure(
            model, data, qcompress.Options(tuple(transforms)), method="sampled", cache=file.with_suffix(".part"),
            skip="model.embed_tokens",
            on_progress=lambda done: print(f"window {done.batches}, {done.elapsed_s:.0f} s", flush=True),
            on_encode=lambda done: print(f"{done.part}, {done.elapsed_s:.0f} s", flush=True),
        )  # fmt: skip
        write_json(times, {"measure_s": time.process_time() - start})
        measurement.save(file)
    return qcompress.Measurement.load(file), read_json(times, "times of a benchmark")["measure_s"]


@torch.no_grad()
def kept_outputs(model: torch.nn.Module, judges: list[torch.Tensor], file: Path) -> np.ndarray[Any, Any]:
    """Return log-probabilities ``(windows, positions, tokens)`` of the float model, from a file if it exists."""
    if not file.exists():
        shape = len(judges), LENGTH, model.config.vocab_size
        with drafting(file) as draft:
            held = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float32, shape=shape)
            for place, window in enumerate(judges):
                held[place] = model(window).logits[0].log_softmax(-1).numpy()
            held.flush()
    return np.load(file, mmap_mode="r")


@torch.no_grad()
def divergence(reference: np.ndarray[Any, Any], model: torch.nn.Module, judges: list[torch.Tensor]) -> float:
    """Return the mean KL divergence in nats per token, as `qcompress.mean_loss` does."""
    each = []
    for log_p, window in zip(reference, judges, strict=True):
        p, q = torch.tensor(log_p), model(window).logits[0].log_softmax(-1)
        each.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return float(np.mean(each))


def nearest(options: Sequence[Transform], transform: Transform, target: Target) -> int:
    """Return the index of the largest option that takes no more bytes than ``transform`` (it may have been dropped)."""
    sizes = [option.size_bytes(target) for option in options]
    fitting = [place for place, size in enumerate(sizes) if size <= transform.size_bytes(target)]
    return max(fitting, key=sizes.__getitem__) if fitting else 0


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
    engine = CompressedTensors(tokenizer=str(words.model))
    transforms = [GroupWise(bits, 0.0, words.compensated, group_size=size) for bits, size in SCHEMES]
    name = f"{NAME}_compensated" if words.compensated else NAME
    measurement, measure_s = measured(model, data, transforms, words.folder / f"{name}_{words.windows}.npz")
    legal, reference = for_engine(engine, model, measurement), kept_outputs(model, judges, words.folder / "outputs.npy")
    rows = Rows(words.folder / "rows.json", {"windows": words.windows, "compensated": words.compensated})

    def add(choice: str, bits: float, solution: qcompress.Solution, gap: float | None) -> None:
        smaller = qcompress.apply(model, legal, solution)
        written = qcompress.export(smaller, words.folder / f"{choice}_{bits}", target=engine)
        _, difference, wrong = checked(engine, written.path, smaller, [judges[0][:, :64]])
        assert not wrong, wrong
        rows.add({
            "asked": bits, "choice": choice, "bits": solution.usage[BITS], "file_bytes": written.size_bytes,
            "predicted": solution.objective, "gap": gap, "kl": divergence(reference, smaller, judges),
            "difference": difference.largest, "measure_s": measure_s,
        })  # fmt: skip

    for bits, (each, size) in UNIFORM.items():
        problem = qcompress.formulate(legal, {BITS: bits}, pairs=False)
        if not rows.of(asked=bits, choice="uniform"):
            transform = GroupWise(each, 0.0, words.compensated, group_size=size)
            alike = np.array([
                nearest(options, transform, part.target)
                for options, part in zip(legal.transforms, legal.parts, strict=True)
            ])  # fmt: skip
            judged = problem.evaluate(alike)
            blank = qcompress.solve(problem, "greedy")
            uniform = dataclasses.replace(blank, choice=alike, objective=judged.objective, usage=judged.usage)
            add("uniform", bits, uniform, None)
        if not rows.of(asked=bits, choice="chosen"):
            tied = tie(problem, engine.ties(legal.parts))
            solved = qcompress.solve(tied.problem, "milp", time_limit=60)
            add("chosen", bits, dataclasses.replace(solved, choice=tied.lift(solved.choice)), solved.gap)
    all_rows = rows.values["rows"]
    table = markdown(all_rows, {key: key for key in all_rows[0]})
    write_results(words.folder, name, rows.values, table)
    print(table)


if __name__ == "__main__":
    main()
