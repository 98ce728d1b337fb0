"""Measuring, applying and checking on an accelerator against the CPU: the same choice, and how much faster?

Every model is measured twice on each device; the second run counts, after everything is loaded and compiled. Costs of
the two devices are compared relative to the largest, choices by the loss that each predicts for the other's. With
``--data`` the residual networks for CIFAR-10 are among the models (see `benchmarks.cifar`); the language model has
random weights in the shape of Llama.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qcompress
from benchmarks.cifar import images, resnet
from benchmarks.tables import markdown, write_results
from qcompress import low_rank, prune_quantize

OPTIONS = {
    "bits": prune_quantize(bits=(2, 3, 4, 6, 8), sparsity=(0,)),
    "bits, compensated": prune_quantize(bits=(3, 4, 8), sparsity=(0,), compensated=True),
    "ranks": low_rank(ratios=(0.25, 0.5, 0.75), whitened=True),
}
BUDGETS = {"bits": {"bytes": 0.12}, "bits, compensated": {"bytes": 0.12}, "ranks": {"macs": 0.6}}


def models(folder: Path | None) -> Iterator[tuple[str, nn.Module, list[Tensor], Callable[..., Tensor] | None]]:
    """Name, model, calibration batches and forward of every model that is available."""
    if folder is not None:
        pixels, _ = images(folder, "cifar10_train4k_lossless", 0, 512)
        for depth in (20, 56):
            if (folder / f"cifar10_resnet{depth}.safetensors").exists():
                yield f"ResNet-{depth}", resnet(depth, folder), list(pixels.split(128)), None
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=512,
    )  # fmt: skip
    words = [torch.randint(8192, (2, 128)) for _ in range(4)]
    yield "Llama-shaped", LlamaForCausalLM(config).eval(), words, lambda model, batch: model(batch).logits


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of the second of two runs, and its result."""
    run()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def on_device(
    device: str, model: nn.Module, batches: list[Tensor], forward: Any, family: str, solver: str
) -> dict[str, Any]:
    """Measure, solve, apply and check with model and data on one device."""
    there, data = model.to(device), [batch.to(device) for batch in batches]
    measure_s, measurement = seconds(lambda: qcompress.measure(there, data, OPTIONS[family], forward=forward))
    problem = qcompress.formulate(measurement, BUDGETS[family])
    solution = qcompress.solve(problem, solver, time_limit=20, seed=0)
    apply_s, smaller = seconds(lambda: qcompress.apply(there, measurement, solution))
    check_s, loss = seconds(lambda: qcompress.mean_loss(there, smaller, data, forward=forward))
    devices = {str(tensor.device.type) for tensor in smaller.state_dict().values()}
    assert devices == {device}, f"the smaller model lies on {devices}, the original on {device}"
    return {
        "problem": problem,
        "choice": solution.choice,
        "measure_s": measure_s,
        "apply_s": apply_s,
        "check_s": check_s,
        "loss": loss,
    }


def compared(name: str, family: str, cpu: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One row: times, and how far numbers and choices of the two devices differ."""
    here, there = cpu["problem"], other["problem"]
    row = {"model": name, "options": family}
    if here.options != there.options:
        return row | {"difference": "other options"}
    scale = np.abs(here.cost).max()
    mine, theirs = (here.evaluate(run["choice"]).objective for run in (cpu, other))
    return row | {
        "measure, CPU s": cpu["measure_s"],
        "measure, accelerator s": other["measure_s"],
        "apply, CPU s": cpu["apply_s"],
        "apply, accelerator s": other["apply_s"],
        "largest difference of a cost": float(np.abs(here.cost - there.cost).max() / scale),
        "groups that choose otherwise": int((cpu["choice"] != other["choice"]).sum()),
        "its choice, predicted here, relative": (theirs - mine) / mine if mine else 0.0,
        "loss, CPU": cpu["loss"],
        "loss, accelerator": other["loss"],
    }


def main() -> None:
    """Run every model with every family of options on both devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("QCOMPRESS_DATA"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--solver", default="lagrangian")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no accelerator is here: torch.cuda.is_available() is False")
    if arguments.data is None:
        print("no --data FOLDER: the residual networks are left out")
    rows = []
    for name, model, batches, forward in models(arguments.data):
        for family in OPTIONS:
            runs = [
                on_device(device, model, batches, forward, family, arguments.solver)
                for device in ("cpu", arguments.device)
            ]
            rows.append(compared(name, family, *runs))
            print(rows[-1], flush=True)
    write_results(arguments.out, "accelerator", rows, markdown(rows, {key: key for key in rows[0]}))


if __name__ == "__main__":
    main()
