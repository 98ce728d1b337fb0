"""Time to measure a language model, relative to a forward and backward pass, and compared with NVIDIA ModelOpt.

    python -m benchmarks.scoring --model FOLDER --text FILE [--sequences 32] [--tokens 256] [--modelopt]

FOLDER has SmolLM2-135M in Hugging Face's format, FILE has plain text. Each step runs in a separate process on one
thread: (1) one forward and backward pass per sequence, with gradients of all weights; (2) `qcompress.measure` with
``method="sampled"`` and eight group-wise options per layer, with the time to encode the options stated separately; (3)
with ``--modelopt`` (``pip install nvidia-modelopt``) its gradient-based `auto_quantize` with the same bits and groups
for the Linear layers, with scoring separate from calibration and search. Seconds are of processor time; memory is the
largest resident size. An interrupted run resumes with the next step.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompress
from benchmarks.clock import processor_time
from benchmarks.smollm2_hf import SCHEMES
from benchmarks.tables import Rows, markdown, write_results
from qcompress.transforms.quantize.group_wise import GroupWise


def sequences(folder: Path, text: Path, count: int, length: int) -> list[Tensor]:
    """Windows of a text, evenly spread, ``(1, length)`` each."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    whole = ids[: len(ids) // length * length].view(-1, 1, length)
    return [whole[place] for place in torch.linspace(0, len(whole) - 1, count).long().tolist()]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


def passes(model: nn.Module, data: list[Tensor]) -> dict[str, float]:
    """One forward and backward pass of every sequence, to the gradients of all weights."""
    model.requires_grad_(True)
    start = time.process_time()
    for ids in data:
        logits = model(ids).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
        nn.functional.cross_entropy(logits, labels).backward()
        model.zero_grad()
    return {"s": time.process_time() - start}


def measured(model: nn.Module, data: list[Tensor]) -> dict[str, float]:
    """Run `qcompress.measure`, and state separately the time to encode the options."""
    encode_s = 0.0

    def told(done: Any) -> None:
        nonlocal encode_s
        if done.parts == done.total_parts:
            encode_s += done.elapsed_s

    options = qcompress.Options(tuple(GroupWise(bits, 0.0, group_size=size) for bits, size in SCHEMES))
    start = time.process_time()
    with processor_time(1):
        measurement = qcompress.measure(model, data, options, method="sampled", on_encode=told)
    whole = time.process_time() - start
    weights = [part.target.num_weights for part in measurement.parts]
    return {"s": whole - encode_s, "encode_s": encode_s, "options": len(SCHEMES), "weights": sum(weights)}


def scored_by_modelopt(model: nn.Module, data: list[Tensor]) -> dict[str, float]:
    """Run ModelOpt's gradient-based `auto_quantize`, and time its scoring of layers separately."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import algorithms

    formats = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, **scales}},
            ],
            "algorithm": "max",
        }
        for bits, scales in ((bits, {"block_sizes": {-1: size}} if size else {"axis": 0}) for bits, size in SCHEMES)
    ]
    scoring_s = 0.0
    searcher = algorithms.AutoQuantizeGradientSearcher
    estimate = searcher.estimate_sensitivity_scores

    def timed(*args: Any) -> Any:
        nonlocal scoring_s
        start = time.process_time()
        score = estimate(*args)
        scoring_s += time.process_time() - start
        return score

    searcher.estimate_sensitivity_scores = timed
    start = time.process_time()
    mtq.auto_quantize(
        model,
        constraints={"effective_bits": 4.0},
        quantization_formats=formats,
        data_loader=data,
        forward_step=lambda model, ids: model(ids),
        loss_func=lambda output, ids: nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:]),
        num_calib_steps=1,
        num_score_steps=len(data),
        method="gradient",
    )
    return {"s": scoring_s, "encode_s": time.process_time() - start - scoring_s, "options": len(SCHEMES)}


STEPS: dict[str, Callable[[nn.Module, list[Tensor]], dict[str, float]]] = {
    "forward and backward pass": passes,
    "qcompress, sampled": measured,
    "ModelOpt, gradient": scored_by_modelopt,
}


def in_processes(words: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of every step."""
    out = Path(words.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = Rows(out / "scoring_rows.json", {"sequences": words.sequences, "tokens": words.tokens})
    for step in STEPS:
        if step.startswith("ModelOpt") and not words.modelopt:
            continue
        if not rows.of(step=step):
            command = [sys.executable, "-m", "benchmarks.scoring", *sys.argv[1:], "--step", step]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
            rows.add({"step": step, **json.loads(told.stdout.splitlines()[-1])})
        yield dict(rows.of(step=step)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="a sequence")
    parser.add_argument("--modelopt", action="store_true", help="score with ModelOpt as well")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.step:
        torch.set_num_threads(1)
        data = sequences(words.model, words.text, words.sequences, words.tokens)
        model = loaded(words.model)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        figures = STEPS[words.step](model, data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9
        print(json.dumps({**figures, "loaded_gb": before, "peak_gb": peak, "model_gb": size}))
        return
    rows = list(in_processes(words))
    for row in rows:
        row["ratio"] = row["s"] / rows[0]["s"]
        row["per_option"] = row["s"] / row["options"] if "options" in row else None
    columns = {
        "step": "", "options": "options", "s": "CPU-s", "ratio": "of a pass", "per_option": "CPU-s an option",
        "encode_s": "options worked out, CPU-s", "peak_gb": "largest resident GB", "model_gb": "model GB",
    }  # fmt: skip
    table = markdown(rows, columns)
    write_results(Path(words.out), "scoring", rows, table)
    print(table)


if __name__ == "__main__":
    main()
