"""SmolLM2-135M as a folder for transformers and vLLM: bits chosen per layer under a budget, against uniform bits.

    python -m benchmarks.smollm2_hf --model FOLDER --text FILE [--folder RUN] [--windows 24] [--length 512]
                                    [--judges 16] [--compensated]

FOLDER has the model in Hugging Face's format; FILE has plain text, cut into windows of 512 tokens. The test data are
``--judges`` windows from number 200, the next 8 are `qcompress.compress`'s validation data, and ``--windows`` others,
evenly spread and cut to ``--length`` tokens, are measured on. Budgets are 4.25, 3.5 and 3.0 bits per weight, counting
scales, over the layers that have a choice (the vocabulary is unchanged), with q/k/v and gate/up tied.

At each budget three folders are written: the uniform scheme with the same number of bits, the choice of least
predicted loss without pair terms (proven), and what ``compress`` returns, which tries pair terms and others on the
validation data. Each is loaded by transformers, and its logits are compared with the emulation's on 64 tokens. Rows
state the KL divergence from the float model, how far it is above that of ``compress``, and the standard error of this
difference over the windows. An interrupted run resumes.
"""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import qcompress
from benchmarks.found import found
from benchmarks.smollm2_gguf import JUDGED, LENGTH
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
CHOICES = ("uniform", "additive", "compress")
UNIFORM = {4.25: (4, 64), 3.5: (3, 32), 3.0: (3, None)}  # bits a weight → bits, group size
VALIDATION = 8  # windows
TIME_LIMIT_S = 60
SCHEMES = [(2, 64), (2, 32), (3, None), (3, 64), (3, 32), (4, 64), (5, 64), (6, 64)]


class LanguageModel(Protocol):
    """What is used here of a language model of transformers."""

    config: Any

    def __call__(self, ids: torch.Tensor) -> Any: ...


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
def kept_outputs(model: LanguageModel, judges: list[torch.Tensor], file: Path) -> np.ndarray[Any, Any]:
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
def divergences(reference: np.ndarray[Any, Any], model: torch.nn.Module, judges: list[torch.Tensor]) -> list[float]:
    """Return the KL divergence of every window in nats per token, as `qcompress.mean_loss` does."""
    each = []
    for log_p, window in zip(reference, judges, strict=True):
        p, q = torch.tensor(log_p), model(window).logits[0].log_softmax(-1)
        each.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return each


def split_windows(folder: Path, text: Path, words: argparse.Namespace) -> tuple[list[torch.Tensor], ...]:
    """Windows for calibration, in batches of 16, for validation, and for the test."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    first = JUDGED[0]
    kept = range(first, first + words.judges + VALIDATION)
    others = torch.tensor([number for number in range(len(whole)) if number not in kept])
    chosen = others[torch.linspace(0, len(others) - 1, words.windows).long()]
    tests, validation = whole[first : first + words.judges], whole[first + words.judges : kept.stop]
    return list(torch.split(whole[chosen, 0, : words.length], 16)), list(validation), list(tests)


def nearest(options: Sequence[Transform], transform: Transform, target: Target) -> int:
    """Return the index of the largest option that takes no more bytes than ``transform`` (it may have been dropped)."""
    sizes = [option.size_bytes(target) for option in options]
    fitting = [place for place, size in enumerate(sizes) if size <= transform.size_bytes(target)]
    return max(fitting, key=sizes.__getitem__) if fitting else 0


def uniform(problem: qcompress.Problem, legal: qcompress.Measurement, transform: GroupWise) -> qcompress.Solution:
    """Return the solution with the same scheme for all layers."""
    alike = np.array([
        nearest(options, transform, part.target)
        for options, part in zip(legal.transforms, legal.parts, strict=True)
    ])  # fmt: skip
    judged = problem.evaluate(alike)
    blank = qcompress.solve(problem, "greedy")
    return dataclasses.replace(blank, choice=alike, objective=judged.objective, usage=judged.usage, gap=None)


def additive(problem: qcompress.Problem, legal: qcompress.Measurement, engine: CompressedTensors) -> qcompress.Solution:
    """Return the proven choice without pair terms."""
    tied = tie(problem, engine.ties(legal.parts))
    solved = qcompress.solve(tied.problem, "milp", time_limit=TIME_LIMIT_S)
    return dataclasses.replace(solved, choice=tied.lift(found(solved).choice))


def with_differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with how far each is above the row of ``compress`` at the same budget, and its standard error.

    >>> each = {"uniform": [2, 4], "compress": [1, 1]}
    >>> rows = [{"asked": 3, "choice": name, "each": losses} for name, losses in each.items()]
    >>> [(row["above"], row["error"]) for row in with_differences(rows)]
    [(2.0, 1.0), (0.0, 0.0)]
    """
    ours = {row["asked"]: np.array(row["each"]) for row in rows if row["choice"] == "compress"}
    new = []
    for row in sorted(rows, key=lambda row: (-row["asked"], CHOICES.index(row["choice"]))):
        more = np.array(row["each"]) - ours[row["asked"]]
        new.append({**row, "above": float(more.mean()), "error": float(more.std(ddof=1) / len(more) ** 0.5)})
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2_hf"), help="where everything is kept")
    parser.add_argument("--windows", type=int, default=24, help="windows to measure on")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of each")
    parser.add_argument("--judges", type=int, default=len(JUDGED), help="windows to judge on")
    parser.add_argument("--compensated", action="store_true", help="codes that make up for each other")
    words = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    data, validation, judges = split_windows(words.model, words.text, words)
    words.folder.mkdir(parents=True, exist_ok=True)
    engine = CompressedTensors(tokenizer=str(words.model))
    transforms = [GroupWise(bits, 0.0, words.compensated, group_size=size) for bits, size in SCHEMES]
    name = f"{NAME}_compensated" if words.compensated else NAME
    file = words.folder / f"{name}_{words.windows}_{words.length}.npz"
    measurement, measure_s = measured(model, data, transforms, file)
    legal = for_engine(engine, model, measurement)
    reference = kept_outputs(model, judges, words.folder / f"outputs_{words.judges}.npy")
    settings = {"windows": words.windows, "length": words.length, "judges": words.judges}
    rows = Rows(words.folder / "rows.json", {**settings, "compensated": words.compensated})

    def add(bits: float, choice: str, smaller: torch.nn.Module, solution: qcompress.Solution, taken: str = "") -> None:
        path = words.folder / f"{choice}_{bits}"
        written = qcompress.export(smaller, path, target=engine)
        _, difference, wrong, _ = checked(engine, written.path, smaller, [judges[0][:, :64]])
        assert not wrong, wrong
        shutil.rmtree(path)
        each = divergences(reference, smaller, judges)
        rows.add({
            "asked": bits, "choice": choice, "taken": taken, "bits": solution.usage[BITS],
            "file_bytes": written.size_bytes, "predicted": solution.objective, "gap": solution.gap,
            "kl": float(np.mean(each)), "difference": difference.largest, "measure_s": measure_s, "each": each,
        })  # fmt: skip

    for bits, (each, size) in UNIFORM.items():
        problem = qcompress.formulate(legal, {BITS: bits}, pairs=False)
        if not rows.of(asked=bits, choice="uniform"):
            solution = uniform(problem, legal, GroupWise(each, 0.0, words.compensated, group_size=size))
            add(bits, "uniform", qcompress.apply(model, legal, solution), solution)
        if not rows.of(asked=bits, choice="additive"):
            solution = additive(problem, legal, engine)
            add(bits, "additive", qcompress.apply(model, legal, solution), solution)
        if not rows.of(asked=bits, choice="compress"):
            result = qcompress.compress(
                model, data, budget={BITS: bits}, measurement=measurement, validation=validation, target=engine,
                time_limit=TIME_LIMIT_S,
            )  # fmt: skip
            print(result.report.to_markdown().split("| part |")[0], flush=True)
            add(bits, "compress", result.model, result.solution, str(result.report.chosen))
    all_rows = with_differences(rows.values["rows"])
    table = markdown(all_rows, {key: key for key in all_rows[0] if key != "each"})
    write_results(words.folder, name, {**rows.values, "rows": all_rows}, table)
    print(table)


if __name__ == "__main__":
    main()
