"""SmolLM2-135M as GGUF: mixtures of ggml's types chosen by a proven optimum, against llama.cpp's presets.

    python -m benchmarks.smollm2_gguf --model FOLDER --text FILE [--folder RUN] [--windows 24] [--preset NAME …]

FOLDER has the model in Hugging Face's form and ``model-f16.gguf``, whose head is taken over; FILE has plain text, which
is cut into windows of 512 tokens: 200 to 215 judge, and ``--windows`` others, evenly spread, are measured on. At the
tensor bytes of each preset the choice of the least predicted loss is written to RUN, and its KL divergence to the float
model stated. The presets' own numbers were taken on the same windows with ``llama-quantize`` and an importance matrix
of 24 windows.
"""

import argparse
import time
from pathlib import Path

import torch

import qcompress
from benchmarks.tables import markdown, write_results
from qcompress.engines.legal import for_engine
from qcompress.engines.llama_cpp.container import head as gguf_head
from qcompress.engines.llama_cpp.content import entries, head_of, values_of
from qcompress.engines.llama_cpp.engine import LlamaCpp

PRESETS = {  # name → bytes of its tensors, KL in nats a token
    "IQ3_XXS": (85_171_968, 0.2046),
    "Q3_K_S": (86_416_128, 0.2686),
    "IQ3_M": (88_427_520, 0.1263),
    "IQ4_XS": (89_111_808, 0.1104),
    "Q3_K_M": (91_724_544, 0.1071),
    "Q4_K_S": (100_253_952, 0.0536),
}
LENGTH, JUDGED = 512, range(200, 216)


def windows(folder: Path, text: Path, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Windows to measure on, evenly spread over the text, and those that judge."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    others = [number for number in range(len(whole)) if number not in JUDGED]
    chosen = [others[place] for place in torch.linspace(0, len(others) - 1, count).long().tolist()]
    return [whole[number] for number in chosen], [whole[number] for number in JUDGED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="where everything is kept")
    parser.add_argument("--windows", type=int, default=24, help="windows to measure on")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only these")
    words = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    data, judges = windows(words.model, words.text, words.windows)
    words.folder.mkdir(parents=True, exist_ok=True)
    engine, start = LlamaCpp(source=str(words.model / "model-f16.gguf")), time.perf_counter()
    file = words.folder / "measurement.npz"
    if file.exists():
        measurement = qcompress.Measurement.load(file)
    else:
        measurement = qcompress.measure(
            model, data, engine.options(), method="sampled", cache=words.folder / "measurement.part",
            on_progress=lambda done: print(f"window {done.batches}, {done.elapsed_s:.0f} s", flush=True),
        )  # fmt: skip
        measurement.save(file)
        print(f"measured in {time.perf_counter() - start:.0f} s: {len(measurement.cost)} options", flush=True)
    legal = for_engine(engine, model, measurement)
    content = head_of(model, engine.source)
    head_bytes = len(gguf_head(values_of(content), [entry.plan for entry in entries(model, content)]))
    rows = []
    for preset in words.preset or PRESETS:
        tensor_bytes, preset_kl = PRESETS[preset]
        problem = qcompress.formulate(legal, {"file_bytes": tensor_bytes + head_bytes}, pairs=False)
        solution = qcompress.solve(problem, "milp", time_limit=60)
        smaller = qcompress.apply(model, legal, solution)
        written = qcompress.export(smaller, words.folder / f"{preset}.gguf", target=engine)
        assert written.size_bytes == solution.usage["file_bytes"]
        kl = qcompress.mean_loss(model, smaller, judges)
        rows.append({
            "preset": preset, "tensor_bytes": written.size_bytes - head_bytes, "preset_kl": preset_kl,
            "predicted": solution.objective, "gap": solution.gap, "kl": kl, "ratio": kl / preset_kl,
            "solve_s": solution.wall_s,
        })  # fmt: skip
        table = markdown(rows, {key: key for key in rows[0]})
        write_results(words.folder, "smollm2_gguf", rows, table)
        print(table, flush=True)


if __name__ == "__main__":
    main()
