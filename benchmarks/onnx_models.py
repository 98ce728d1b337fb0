"""Networks in ONNX Runtime: bytes, quality and time of choices against float32, ORT's own int8 and uniform bits.

    python -m benchmarks.onnx_models resnet20 --data FOLDER
    python -m benchmarks.onnx_models efficientnet --data FOLDER
    python -m benchmarks.onnx_models minilm --data FOLDER [--model FOLDER]
    python -m benchmarks.onnx_models smollm2 --model FOLDER --text FILE

Batch norms are folded. Options are 4 and 8 bits for weights alone, and weights and activations in 8 bits with static
and dynamic ranges; each is timed in the engine on the first timed batch. `qcompress.compress` makes the choices, for
several shares of the float32 file's time, for the time of each fast uniform choice, and for shares of the bytes. It
checks them on samples that are neither measured nor judged on. One thread; times are milliseconds of processor time a
sample, the minimum of many runs in turn over all files. Quality and loss, that of the network's outputs to the
float32 file's, are measured in the engine. ``ORT dynamic`` and ``ORT static`` are ONNX Runtime's quantizers with
their defaults, static in QuantizeLinear/DequantizeLinear pairs with ranges from the calibration data. The last table
sets the best choice in the time of each other file beside it. Everything is kept in ``--folder``; an
interrupted run resumes.
"""

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qcompress
from benchmarks.onnx_cases import CASES, Case
from benchmarks.tables import markdown, write_results
from benchmarks.traces import traced_once
from formulations import InfeasibleBudgetError
from formulations.files import drafting, read_json, write_json
from qcompress.budgets import FILE_BYTES, LATENCY
from qcompress.engines.in_time import TOLERANCE
from qcompress.engines.legal import for_engine
from qcompress.engines.onnx_clock import LONG_S, in_turn
from qcompress.engines.onnx_tracing import feed_of, inputs_of
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.model.losses import as_loss
from qcompress.transforms.base import Transform
from qcompress.transforms.quantize.integer import IntegerProduct
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

ENGINE = OnnxRuntime(threads=1)
ROUNDS = 25
TIME_LIMIT_S = 5
QUICK = 0.97  # of float32's time


def quantized_by_ort(whole: Path, case: Case, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of ONNX Runtime's quantizers, and write those that an earlier run has not written."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.registry import IntegerOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [given.name for given in ENGINE.session(whole).get_inputs()]
    # for the operator Attention it makes one that ONNX Runtime does not load
    operators = [name for name in IntegerOpsRegistry if name != "Attention"]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(case.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            if batch is None:
                return None
            return {name: entry.numpy() for name, entry in zip(names, inputs_of(batch), strict=True)}

    def dynamic(ready: str, path: str) -> None:
        quantize_dynamic(ready, path, op_types_to_quantize=operators)

    def static(ready: str, path: str) -> None:
        quantize_static(ready, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)

    for quantize in (dynamic, static):
        path, ready = folder / f"{quantize.__name__}.onnx", folder / "ready.onnx"
        if not path.exists():
            quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
            with drafting(path) as draft:
                quantize(str(ready), str(draft))
        yield f"ORT {quantize.__name__}", path


def session_of(name: str, path: Path) -> Any:
    """Open a session; ORT's files get its defaults, as its int8 kernels are chosen by their QuantizeLinear pairs."""
    if not name.startswith("ORT"):
        return ENGINE.session(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measured(case: Case, folder: Path) -> qcompress.Measurement:
    """Return losses and bytes of all options, from the folder if they are there."""
    options = qcompress.integer_products(case.ranges, bits=(8, 7)) + qcompress.prune_quantize(bits=(8,), sparsity=(0,))
    options += qcompress.prune_quantize(bits=(4, 8), group_size=case.groups, compensated=case.method == "fisher")
    file = folder / "measurement.npz"
    if not file.exists():
        start = time.process_time()
        measurement = qcompress.measure(case.model, case.calibration, options, loss=case.loss, method=case.method)
        measurement.save(file)
        print(f"measured in {time.process_time() - start:.0f} s: {len(measurement.cost)} options", flush=True)
    return for_engine(ENGINE, case.model, qcompress.Measurement.load(file), case.calibration[0])


def uniform(legal: qcompress.Measurement, grouped: int | None, *fits: Callable[[Transform], bool]) -> list[int]:
    """Choose in every part the first option that fits best, or 8 bits for the weights alone, or the original."""
    whole_or_grouped = (functools.partial(is_stored_in, 8, size) for size in (grouped, None))
    in_order: list[Callable[[Transform], bool]] = [*fits, *whole_or_grouped]

    def place(options: Sequence[Transform]) -> int:
        for wanted in in_order:
            if fitting := [index for index, transform in enumerate(options) if wanted(transform)]:
                return fitting[0]
        return 0

    return [place(options) for options in legal.transforms]


def uniform_choices(legal: qcompress.Measurement, grouped: int | None) -> Iterator[tuple[str, list[int]]]:
    """Yield choices with the same option in all parts that have it."""
    yield "float32", [0] * len(legal.parts)
    for bits, kind in ((8, "static"), (7, "static"), (8, "dynamic")):
        fits = [functools.partial(is_in_integers, width, kind == "dynamic") for width in dict.fromkeys((bits, 8))]
        if sum(any(map(fits[0], options)) for options in legal.transforms) > len(legal.parts) / 2:
            yield f"uniform W{bits}A8, {kind}", uniform(legal, grouped, *fits)
    for bits in (8, 4):
        yield f"uniform {bits} bits", uniform(legal, grouped, functools.partial(is_stored_in, bits, grouped))


def is_in_integers(bits: int, dynamic: bool, transform: Transform) -> bool:
    """Whether weights are in so many bits and activations in 8, with ranges of that kind."""
    return isinstance(transform, IntegerProduct) and (transform.bits, transform.dynamic) == (bits, dynamic)


def is_stored_in(bits: int, group_size: int | None, transform: Transform) -> bool:
    """Whether only weights are quantized, to ``bits`` bits in groups of ``group_size``."""
    grouped = getattr(transform, "group_size", None) == group_size
    return isinstance(transform, PruneQuantize) and transform.bits == bits and grouped


def asked(case: Case, alike: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Return budgets by name: shares of the float32 file's time and bytes, and the times of fast uniform choices."""
    seconds = in_turn([ENGINE.session(path) for path in alike.values()], [case.timed[0]], 1, ROUNDS, LONG_S)
    shares = {name: taken / seconds[0] for name, taken in zip(alike, seconds, strict=True)}
    budgets = {f"chosen, {share:g} of the time": {LATENCY: f"{share:.0%}"} for share in case.times}
    budgets |= {
        f"chosen, in the time of {name}": {LATENCY: f"{share:.2%}"} for name, share in shares.items() if share < QUICK
    }
    return budgets | {f"chosen, {share:g} of the bytes": {FILE_BYTES: f"{share:.0%}"} for share in case.sizes}


def written(case: Case, legal: qcompress.Measurement, folder: Path) -> dict[str, Path]:
    """Write a file for every choice that an earlier run has not written."""
    listed = folder / "files.json"
    known = read_json(listed, "files of a benchmark") if listed.exists() else {"files": {}, "asked": {}}
    files: dict[str, str] = known["files"]

    def add(name: str, write: Callable[[Path], object]) -> None:
        if name not in files:
            path = folder / f"{len(files)}.onnx"
            write(path)
            files[name] = path.name
            write_json(listed, known)
            print(f"{name}: {path.stat().st_size:,} bytes", flush=True)

    blank = qcompress.solve(qcompress.formulate(legal, {FILE_BYTES: 1.0}), "greedy")
    alike = dict(uniform_choices(legal, case.groups[-1]))
    for name, choice in alike.items():
        solution = replace(blank, choice=np.array(choice))
        add(name, functools.partial(_export, case, legal, solution))
    if not known["asked"]:
        known["asked"] = asked(case, {name: folder / files[name] for name in alike})
        write_json(listed, known)
    for name, budget in known["asked"].items():
        try:
            add(name, functools.partial(_compress, case, legal, budget, folder / "run"))
        except InfeasibleBudgetError as error:
            print(f"{name}: {error}", flush=True)
    return {name: folder / file for name, file in files.items()}


def _export(case: Case, legal: qcompress.Measurement, solution: qcompress.Solution, path: Path) -> None:
    model = qcompress.apply(case.model, legal, solution)
    qcompress.export(model, path, target=ENGINE, example=case.calibration[0])


def _compress(case: Case, legal: qcompress.Measurement, budget: dict[str, str], folder: Path, path: Path) -> None:
    result = qcompress.compress(
        case.model, [case.timed[0], *case.calibration], budget=budget, measurement=legal, validation=case.validation,
        loss=case.loss, target=ENGINE, output=path, time_limit=TIME_LIMIT_S, folder=folder,
    )  # fmt: skip
    print(f"taken: {result.report.chosen}; {len(result.report.candidates)} seen", flush=True)


def judged(case: Case, files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Yield a row for every file."""
    sessions = {name: session_of(name, path) for name, path in files.items()}
    seconds = [in_turn(list(sessions.values()), [batch], 1, ROUNDS, LONG_S) for batch in case.timed]
    counts = [len(inputs_of(batch)[0]) for batch in case.timed]
    loss, reference = as_loss(case.loss), None
    for place, (name, session) in enumerate(sessions.items()):
        outputs = [torch.from_numpy(session.run(None, feed_of(session, batch))[0]) for batch in case.tests]
        reference = outputs if reference is None else reference
        row = {
            "file": name,
            "bytes": files[name].stat().st_size,
            "quality": case.quality(outputs),
            "loss": _mean(loss, reference, outputs, case.tests),
        }
        for count, times in zip(counts, seconds, strict=True):
            row |= {f"ms{count}": 1000 * times[place] / count, f"faster{count}": times[0] / times[place]}
        print(row, flush=True)
        yield row


def _mean(loss: Any, reference: list[Tensor], outputs: list[Tensor], tests: Sequence[Any]) -> float:
    """Return the mean loss relative to the outputs of the float32 file."""
    each = [loss.rise(b, a, batch) for a, b, batch in zip(reference, outputs, tests, strict=True)]
    return float(torch.cat([values.flatten() for values in each]).mean())


def against(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set two chosen files beside every other: the one of least loss in its time, and the fastest that is as good.

    >>> rows = [{"file": "ORT", "ms1": 2.0, "loss": 0.2, "quality": 80.0},
    ...         {"file": "chosen, a", "ms1": 2.01, "loss": 0.1, "quality": 81.0},
    ...         {"file": "chosen, b", "ms1": 1.0, "loss": 0.15, "quality": 80.0}]
    >>> [(row["least_loss"], row["as_good"]) for row in against(rows)]
    [('chosen, a', 'chosen, b')]
    """
    clock = next(key for key in rows[0] if key.startswith("ms"))
    chosen = [row for row in rows if row["file"].startswith("chosen")]
    pairs = []
    for row in rows:
        if row in chosen:
            continue
        in_time = [other for other in chosen if other[clock] <= (1 + TOLERANCE) * row[clock]]
        as_good = [other for other in in_time if other["quality"] >= row["quality"]]
        pair = {"file": row["file"], **{key: row[key] for key in (clock, "loss", "quality")}}
        for name, others, key in (("least_loss", in_time, "loss"), ("as_good", as_good, clock)):
            best = min(others, key=lambda other: other[key], default={})
            pair |= {name: best.get("file"), f"{name}_ms": best.get(clock), f"{name}_loss": best.get("loss"),
                     f"{name}_quality": best.get("quality")}  # fmt: skip
        pairs.append(pair)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--data", help="folder with the images or sentences")
    parser.add_argument("--model", help="folder of MiniLM's or SmolLM2's files")
    parser.add_argument("--text", help="plain text for SmolLM2")
    parser.add_argument("--folder", default=Path("runs/onnx"), type=Path, help="where everything is kept")
    parser.add_argument("--out", default="benchmarks/results", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    case, folder = CASES[words.network](words), words.folder / words.network
    folder.mkdir(parents=True, exist_ok=True)
    with traced_once(2 if words.network == "smollm2" else None):
        files = written(case, measured(case, folder), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files |= dict(quantized_by_ort(files["float32"], case, folder))
    rows = list(judged(case, files))
    columns = {"file": "file", "bytes": "bytes", "quality": "quality", "loss": "loss"}
    for count in [key.removeprefix("ms") for key in rows[0] if key.startswith("ms")]:
        columns |= {f"ms{count}": f"ms a sample, batch {count}", f"faster{count}": "times float32's speed"}
    pairs = against(rows)
    for name, lines, heads in (("", rows, columns), ("_against", pairs, {key: key for key in pairs[0]})):
        table = markdown(lines, heads)
        write_results(words.out, f"onnx_{words.network}{name}", lines, table)
        print(f"{table}\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
