"""Write and run random models and choices: does an engine refuse one, or differ from predicted bytes or outputs?

    python -m benchmarks.engine_fuzz onnxruntime [--runs 1000] [--start 1000]
    python -m benchmarks.engine_fuzz onnxruntime-integers
    python -m benchmarks.engine_fuzz compressed-tensors
    python -m benchmarks.engine_fuzz llama.cpp

The models are those of the tests: every kind of layer, odd shapes, with and without bias, tied and shared weights.
The options of ``onnxruntime-integers`` include activations in 8 bits. Each model is run with one random choice, for
llama.cpp with ten. PyTorch's exporter takes most of the time for ONNX, so networks that differ only in their weights
are traced once. A failure is printed with its
seed; the last line counts them.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.traces import traced_once
from tests.engines import test_compressed_tensors, test_llama_cpp, test_onnxruntime

RUNS: dict[str, Callable[[int, Path], None]] = {
    "onnxruntime": test_onnxruntime.one_run,
    "onnxruntime-integers": test_onnxruntime.one_integer_run,
    "compressed-tensors": test_compressed_tensors.one_run,
    "llama.cpp": functools.partial(test_llama_cpp.one_run, choices=10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=RUNS)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--start", type=int, default=1000, help="the first seed")
    words = parser.parse_args()
    failed, start = [], time.perf_counter()
    with traced_once():
        for seed in range(words.start, words.start + words.runs):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    RUNS[words.engine](seed, Path(folder))
                except Exception as error:  # every kind of failure is counted, and printed
                    failed.append(seed)
                    print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            if (seed - words.start + 1) % 50 == 0:
                print(f"{seed - words.start + 1} runs, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{words.runs} models in {words.engine}: {len(failed)} failed{f' (seeds {failed})' if failed else ''}")


if __name__ == "__main__":
    main()
