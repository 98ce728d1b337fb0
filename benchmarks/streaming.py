"""Models larger than memory: time against size, under a hard limit of the process's address space.

    python -m benchmarks.streaming --folder FOLDER [--sizes 0.1 0.4 1.5 6] [--limit 3] [--samples 4] [--tokens 64]

For each size (GB on disk) a model of Llama's shape with random weights is written to FOLDER in shards, opened,
measured, solved, applied, written for compressed-tensors and compared, all in a process whose address space is limited
to ``--limit`` GB (``RLIMIT_AS``). Reported are the processor time of every step, and the largest resident size and
address space.
``--kill N`` runs once more with N kills: the process is killed a random time after it began to write files of its own,
and started again, until N of them died; a run that ends earlier begins anew. The files of every such run are compared
with those of the run that was not killed. A run that was cut goes on, also among the kills; the models are deleted
afterwards unless ``--keep``.
``--rates`` only prints what one thread reads, passes, encodes and decodes in a second of processor time.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.clock import processor_time
from benchmarks.tables import markdown, write_results

BITS, GROUP = (3, 4), 64
SHAPES = {0.1: (512, 5, 1536), 0.4: (1024, 7, 2816), 1.5: (1536, 13, 4096), 6.0: (2048, 31, 5632)}
"""Mapping from a size in GB to width, number of layers and intermediate width."""


def build(folder: Path, size: float) -> None:
    """Write a random model of about ``size`` GB in float32, one layer at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    width, layers, inner = SHAPES[size]
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        place = f"model.layers.{layer}"
        write(f"layer_{layer:03}.safetensors", {
            f"{place}.input_layernorm.weight": (width,), f"{place}.post_attention_layernorm.weight": (width,),
            f"{place}.self_attn.q_proj.weight": (width, width), f"{place}.self_attn.k_proj.weight": (width // 2, width),
            f"{place}.self_attn.v_proj.weight": (width // 2, width),
            f"{place}.self_attn.o_proj.weight": (width, width), f"{place}.mlp.gate_proj.weight": (inner, width),
            f"{place}.mlp.up_proj.weight": (inner, width), f"{place}.mlp.down_proj.weight": (width, inner),
        })  # fmt: skip
    write("rest.safetensors", {
        "model.embed_tokens.weight": (8192, width), "model.norm.weight": (width,), "lm_head.weight": (8192, width),
    })  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def compress(folder: Path, run: Path, limit: float, samples: int, tokens: int) -> None:
    """Run everything in the limited process, from opening the model to verifying the file; figures go to ``run``."""
    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 1e9), int(limit * 1e9)))
    import torch

    import qcompress

    start = time.perf_counter()  # of processor time, so it is also what starting took
    model = qcompress.open_model(folder)
    data = [torch.randint(8192, (samples, tokens), generator=torch.Generator().manual_seed(1))]
    kept = [torch.randint(8192, (2, tokens), generator=torch.Generator().manual_seed(2))]
    shutil.rmtree(run / "out", ignore_errors=True)
    result = qcompress.compress(
        model, data, budget={"bits_per_weight": 3.9}, options=qcompress.prune_quantize(bits=BITS, group_size=GROUP),
        only="model.layers.*", method="sampled", target="compressed-tensors", output=run / "out", folder=run / "run",
        validation=kept, guard=False, solver="milp", pairs=False, time_limit=60, memory=f"{limit - 0.5} GB",
        on_measure=lambda told: print(f"{told.batches} of {told.total_batches} blocks, {told.elapsed_s:.0f} s"),
    )  # fmt: skip
    assert result.verification is not None
    assert result.verification.ok, result.verification.why_not
    figures = {
        "start_s": start,
        "all_s": time.perf_counter() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "address_gb": _largest_address_space() / 1e9,
        "max_difference": result.verification.max_difference,
        "loss_predicted": result.report.loss_predicted,
        "loss_measured": result.report.loss_measured,
        "file_gb": result.exported.size_bytes / 1e9 if result.exported else 0.0,
        **{f"{step}_s": seconds for step, seconds in result.report.wall_s.items()},
    }
    (run / "figures.json").write_text(json.dumps(figures))


def _largest_address_space() -> int:
    """Return the bytes of this process's largest address space, as reported by Linux."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == "VmPeak:")


def command_of(words: argparse.Namespace, folder: Path, run: Path) -> list[str]:
    """Command line of the process in which `compress` runs."""
    return [
        sys.executable, "-m", "benchmarks.streaming", "--folder", str(folder), "--run", str(run), "--limit",
        str(words.limit), "--samples", str(words.samples), "--tokens", str(words.tokens),
    ]  # fmt: skip


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "NUMBA_NUM_THREADS": "1"}


def limited(words: argparse.Namespace, folder: Path, run: Path) -> dict[str, Any]:
    """Run `compress` in a process of its own; return its figures."""
    run.mkdir(parents=True, exist_ok=True)
    subprocess.run(command_of(words, folder, run), env={**os.environ, **ENVIRONMENT}, check=True)  # noqa: S603
    figures: dict[str, Any] = json.loads((run / "figures.json").read_text())
    return figures


def killed(words: argparse.Namespace, folder: Path, run: Path, uncut: dict[str, Any], expected: str) -> dict[str, Any]:
    """Run `compress` killed ``words.kill`` times, in as many runs as that takes.

    A process lives for a random time, on average the uncut run's time by the number of kills, after it wrote a
    file that the one before it had not written.

    Args:
        words: the command line.
        folder: the model.
        run: folder for the runs.
        uncut: figures of the run that was not killed.
        expected: digest of its files.
    """
    file = run.parent / f"{run.name}.json"  # written after every kill and run; a call that is cut goes on from there
    figures = json.loads(file.read_text()) if file.exists() else {"kills": 0, "runs": 0, "same": 0}
    while figures["kills"] < words.kill or not figures["runs"]:
        run.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(command_of(words, folder, run), env={**os.environ, **ENVIRONMENT})  # noqa: S603
        life_s = 2 * random.Random(figures["kills"]).random() * uncut["all_s"] / words.kill  # noqa: S311
        if figures["kills"] < words.kill and _dies(process, run, life_s):
            figures["kills"] += 1
            last = max(_files(run), key=lambda file: file.stat().st_mtime_ns).relative_to(run)
            print(f"kill {figures['kills']}, {life_s:.1f} s after its first file; the last is {last}", flush=True)
        elif process.wait():
            raise SystemExit(f"the run after {figures['kills']} kills failed")
        else:
            figures["runs"] += 1
            figures["same"] += digest(run / "out") == expected
            shutil.rmtree(run)
        file.write_text(json.dumps(figures))
    return figures


def _files(run: Path) -> set[Path]:
    return {file for file in run.rglob("*") if file.is_file()}


def _dies(process: "subprocess.Popen[bytes]", run: Path, life_s: float) -> bool:
    """Kill a process ``life_s`` of processor time after it wrote a new file; whether it had not ended by itself."""
    ticks, before, begun_s = os.sysconf("SC_CLK_TCK"), _files(run), math.inf
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            used_s = sum(map(int, used)) / ticks
            if math.isinf(begun_s) and {file for file in _files(run) - before if file.suffix != ".json"}:
                begun_s = used_s
            if used_s - begun_s >= life_s:
                process.kill()
                return process.wait() < 0
        time.sleep(0.02)
    return False


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder."""
    sha = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        sha.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()


def row(words: argparse.Namespace, size: float) -> dict[str, Any]:
    """Return the row of one model size."""
    folder = words.folder / f"model_{size}"
    if not (folder / "model.safetensors.index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        build(folder, size)
    on_disk = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    file = words.folder / f"run_{size}" / "figures.json"  # of a run that an earlier call has done
    figures = json.loads(file.read_text()) if file.exists() else limited(words, folder, file.parent)
    if words.kill:
        figures |= killed(words, folder, words.folder / f"killed_{size}", figures, digest(file.parent / "out"))
    if not words.keep:
        shutil.rmtree(folder)
    return {"gb": on_disk, **figures}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot time and peak resident memory against the model's size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    sizes = [row["gb"] for row in rows]
    for step in ("measure_s", "apply_s", "export_s", "verify_s"):
        left.loglog(sizes, [row[step] for row in rows], "o-", label=step.removesuffix("_s"))
    left.set(xlabel="model on disk (GB)", ylabel="seconds")
    left.legend()
    right.semilogx(sizes, [row["peak_gb"] for row in rows], "o-")
    right.set(xlabel="model on disk (GB)", ylabel="largest resident size (GB)", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def rates() -> dict[str, float]:
    """Return rates of one thread per second of processor time: GB read, GFLOP, million weights encoded and decoded."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    from qcompress.model.weight_files import WeightFiles
    from qcompress.transforms.base import Target, Weight
    from qcompress.transforms.quantize.group_wise import GroupWise

    def seconds(run: Any, least: float = 0.5) -> float:
        run()
        start, count = time.process_time(), 0
        while time.process_time() - start < least:
            run()
            count += 1
        return (time.process_time() - start) / count

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rates_per_s = {}
    with tempfile.TemporaryDirectory() as folder:
        save_file({"x": torch.zeros(64_000_000, dtype=torch.bfloat16)}, Path(folder) / "model.safetensors")
        files = WeightFiles(Path(folder))
        rates_per_s["read_gb"] = 0.128 / seconds(lambda: files.read("x"))
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        left, right = (torch.randn(256, 4096).to(dtype), torch.randn(4096, 4096).to(dtype))
        rates_per_s[f"pass_gflop_{name}"] = (
            2 * 256 * 4096**2 / 1e9 / seconds(lambda left=left, right=right: left @ right)
        )
    rows = torch.randn(256, 4096, generator=generator)
    target = Target(layer="Linear", channels=256, per_channel=4096, dtype=torch.float32, macs=0.0, common_input=True)
    weight = Weight(rows, target)
    for bits in BITS:
        transform = GroupWise(bits, 0.0, group_size=GROUP)
        stored = transform.encode(weight)
        rates_per_s[f"encode_{bits}_bits_mw"] = rows.numel() / 1e6 / seconds(partial(transform.encode, weight))
        rates_per_s[f"decode_{bits}_bits_mw"] = rows.numel() / 1e6 / seconds(partial(transform.decode, stored, target))
    narrow, gradient = rows.to(torch.bfloat16), torch.randn(rows.numel())
    other = narrow + 1
    multiplied = seconds(lambda: float(gradient @ (other - narrow).float().view(-1)))
    rates_per_s["multiply_mw"] = rows.numel() / 1e6 / multiplied
    return rates_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/streaming"), help="for models and runs")
    parser.add_argument("--sizes", type=float, nargs="+", choices=SHAPES, default=[0.1, 0.4, 1.5, 6.0], help="GB")
    parser.add_argument("--limit", type=float, default=3.0, help="GB of address space")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kill", type=int, default=0, help="times that a second run is killed and started again")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON, Markdown and the plot go")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rates", action="store_true", help="only what one thread does in a second")
    words = parser.parse_args()
    if words.rates:
        print(json.dumps({name: round(value, 3) for name, value in rates().items()}, indent=2))
        return
    if words.run is not None:
        with processor_time(1):
            compress(words.folder, words.run, words.limit, words.samples, words.tokens)
        return
    rows = [row(words, size) for size in words.sizes]
    columns = {
        "gb": "GB on disk", "peak_gb": "largest resident GB", "address_gb": "largest address space GB",
        "measure_s": "measure s", "apply_s": "apply s", "export_s": "write s", "verify_s": "compare s",
        "all_s": "all s", "kills": "kills", "runs": "in runs", "same": "of which gave the same bytes",
    }  # fmt: skip
    table = markdown(rows, columns)
    name = "streaming_killed" if words.kill else "streaming"
    write_results(Path(words.out), name, rows, table)
    plot(rows, Path(words.out) / f"{name}.png")
    print(table)


if __name__ == "__main__":
    main()
