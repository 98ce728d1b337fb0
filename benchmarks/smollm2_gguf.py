"""SmolLM2-135M as GGUF: mixtures of ggml's types chosen by a proven optimum, against llama.cpp's presets.

    python -m benchmarks.smollm2_gguf --model FOLDER --text FILE [--folder RUN] [--windows 24] [--preset NAME …]
    python -m benchmarks.smollm2_gguf --model FOLDER --text FILE --compensated

FOLDER has the model in Hugging Face's format and ``model-f16.gguf``, whose header is copied. FILE has plain text, which
is cut into windows of 512 tokens: windows 200 to 215 are the test data, ``--windows`` others, evenly spread, are the
calibration data. At the tensor bytes of each preset, the choice with the least predicted loss is written to RUN, and
its KL divergence from the float model is computed. With ``--compensated``, codes, scales and offsets are chosen here
from the second moments of the layers' inputs, otherwise by ggml. The presets were evaluated on the same windows, with
``llama-quantize`` and an importance matrix of 24 windows.

Times are processor seconds of all threads: ``measure_s`` once for all sizes (moments, encoding of all options, costs),
then solving and writing for each size; ``ggml_s`` for ggml's encoders on the chosen mixture; ``llama_quantize_s`` for
llama.cpp to write the preset (needs the package ``cyllama``, which includes ``llama_model_quantize``).
"""

import argparse
import dataclasses
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import qcompress
from benchmarks.found import found
from benchmarks.tables import markdown, write_results
from formulations.files import drafting, read_json, write_json
from qcompress.engines.legal import for_engine
from qcompress.engines.llama_cpp.container import header_bytes
from qcompress.engines.llama_cpp.content import entries, values_of
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.llama_cpp.header import header_of
from qcompress.options import Options, gguf_types
from qcompress.transforms.base import Keep
from qcompress.transforms.ggml.gguf_type import GgufType

PRESETS = {  # name → bytes of its tensors, KL in nats a token
    "IQ3_XXS": (85_171_968, 0.2046),
    "Q3_K_S": (86_416_128, 0.2686),
    "IQ3_M": (88_427_520, 0.1263),
    "IQ4_XS": (89_111_808, 0.1104),
    "Q3_K_M": (91_724_544, 0.1071),
    "Q4_K_S": (100_253_952, 0.0536),
}
FILE_TYPES = {"IQ3_XXS": 23, "Q3_K_S": 11, "IQ3_M": 27, "IQ4_XS": 30, "Q3_K_M": 12, "Q4_K_S": 14}  # of llama.cpp
NEEDS_MATRIX = ("IQ3_XXS",)
LENGTH, JUDGED = 512, range(200, 216)
COMPENSATED = ("Q5_K", "Q4_K", "IQ4_XS", "Q3_K")  # once compensated, others lose more in as many bytes


def windows(folder: Path, text: Path, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Windows for calibration, evenly spread over the text, and windows for evaluation."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    others = [number for number in range(len(whole)) if number not in JUDGED]
    chosen = [others[place] for place in torch.linspace(0, len(others) - 1, count).long().tolist()]
    return [whole[number] for number in chosen], [whole[number] for number in JUDGED]


def measured(model: torch.nn.Module, data: list[torch.Tensor], options: Options, file: Path) -> qcompress.Measurement:
    """The measurement with its encoded options; both are stored, so that an interrupted run resumes."""
    codes, times = file.with_suffix(".safetensors"), file.with_suffix(".json")
    if file.exists():
        measurement = qcompress.Measurement.load(file)
    else:
        start = time.process_time()
        measurement = qcompress.measure(
            model, data, options, method="sampled", cache=file.with_suffix(".part"),
            on_progress=lambda done: print(f"window {done.batches}, {done.elapsed_s:.0f} s", flush=True),
            on_encode=lambda done: print(f"{done.part}, {done.elapsed_s:.0f} s", flush=True),
        )  # fmt: skip
        arrays = {
            f"{part} {option} {key}": array
            for (part, option), stored in measurement.codes.items()
            for key, array in stored.items()
        }
        with drafting(codes) as draft:
            save_file(arrays, draft)
        write_json(times, {"measure_s": time.process_time() - start})
        measurement.save(file)
    if codes.exists():
        known: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        for name, array in load_file(codes).items():
            part, option, key = name.split()
            known.setdefault((int(part), int(option)), {})[key] = array
        measurement = dataclasses.replace(measurement, codes=known)
    return measurement


def ggml_seconds(model: torch.nn.Module, measurement: qcompress.Measurement, solution: qcompress.Solution) -> float:
    """Seconds that ggml takes to encode a mixture of types."""
    choice = found(solution).choice
    start = time.process_time()
    for options, option, weight in zip(measurement.transforms, choice, measurement.weights(model), strict=True):
        transform = options[option]
        if isinstance(transform, GgufType):
            transform.nearest.encode(weight)
        else:
            assert isinstance(transform, Keep)
    return time.process_time() - start


def llama_quantize_seconds(source: Path, preset: str, folder: Path) -> float | None:
    """Seconds llama.cpp takes to write a preset without an importance matrix; None if it refuses or is missing."""
    if importlib.util.find_spec("cyllama") is None or preset in NEEDS_MATRIX:
        return None
    from cyllama.llama import llama_cpp

    words = llama_cpp.LlamaModelQuantizeParams()
    words.ftype, words.nthread = FILE_TYPES[preset], torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        start = time.process_time()
        llama_cpp.model_quantize(str(source), str(Path(place) / "preset.gguf"), words)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"), help="where everything is kept")
    parser.add_argument("--windows", type=int, default=24, help="windows to measure on")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only these")
    parser.add_argument("--compensated", action="store_true", help="codes that make up for each other")
    words = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    data, judges = windows(words.model, words.text, words.windows)
    words.folder.mkdir(parents=True, exist_ok=True)
    engine = LlamaCpp(source=str(words.model / "model-f16.gguf"))
    name = "smollm2_gguf_compensated" if words.compensated else "smollm2_gguf"
    options = (
        gguf_types(COMPENSATED, compensated=True) + gguf_types(("Q6_K",)) if words.compensated else engine.options()
    )
    file = words.folder / f"measurement{'_compensated' if words.compensated else ''}.npz"
    measurement, times = measured(model, data, options, file), file.with_suffix(".json")
    measure_s = read_json(times, "times of a benchmark")["measure_s"] if times.exists() else None
    legal = for_engine(engine, model, measurement)
    content = header_of(model, engine.source)
    head_bytes = len(header_bytes(values_of(content), [entry.plan for entry in entries(model, content)]))
    results = words.folder / f"{name}.json"
    rows = read_json(results, "rows of a benchmark")["rows"] if results.exists() else []
    for preset in words.preset or PRESETS:
        if any(row["preset"] == preset for row in rows):
            continue
        tensor_bytes, preset_kl = PRESETS[preset]
        problem = qcompress.formulate(legal, {"file_bytes": tensor_bytes + head_bytes}, pairs=False)
        start = time.process_time()
        solution = qcompress.solve(problem, "milp", time_limit=60)
        solve_s, start = time.process_time() - start, time.process_time()
        smaller = qcompress.apply(model, legal, solution)
        written = qcompress.export(smaller, words.folder / f"{name}_{preset}.gguf", target=engine)
        write_s = time.process_time() - start
        assert written.size_bytes == solution.usage["file_bytes"]
        kl = qcompress.mean_loss(model, smaller, judges)
        rows.append({
            "preset": preset, "tensor_bytes": written.size_bytes - head_bytes, "preset_kl": preset_kl,
            "predicted": solution.objective, "gap": solution.gap, "kl": kl, "ratio": kl / preset_kl,
            "measure_s": measure_s, "solve_s": solve_s, "write_s": write_s,
            "ggml_s": ggml_seconds(model, legal, solution),
            "llama_quantize_s": llama_quantize_seconds(Path(engine.source), preset, words.folder),
        })  # fmt: skip
        table = markdown(rows, {key: key for key in rows[0]})
        write_results(words.folder, name, rows, table)
        print(table, flush=True)


if __name__ == "__main__":
    main()
