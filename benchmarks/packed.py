"""Weights that stay packed in memory: what is saved, and what decoding them in every forward pass costs.

Networks of random weights (only sizes matter here), every layer in the same option; the dense model, its packed twin,
and the time of a batch of the one relative to that of the other, by turns in one run on one thread. Memory: what the
modules hold, and how much larger the process is with the model than without.

    python -m benchmarks.packed [--out benchmarks/results]
"""

import argparse
import copy
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import time_ratios
from benchmarks.tables import markdown, write_results
from qcompress import pack_
from qcompress.compressed.record import CompressedPart, Compression, attach, install_, record_of
from qcompress.model.parts import survey
from qcompress.model.tensors import size_bytes, total_bytes
from qcompress.transforms.base import Transform, Weight
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

OPTIONS: dict[str, Transform] = {
    "8 bits": PruneQuantize(8, 0.0),
    "4 bits": PruneQuantize(4, 0.0),
    "3 bits": PruneQuantize(3, 0.0),
    "4 bits, half sparse": PruneQuantize(4, 0.5),
}


class Encoder(nn.Module):
    """A sentence encoder of the sizes of MiniLM: 30,522 words, 6 layers of width 384."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30_522, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids)).mean(1)


def convolutions() -> nn.Module:
    """Convolutions of the sizes of ResNet-18's last stages."""
    return nn.Sequential(
        nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 512, 3, padding=1), nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "encoder, 1 × 16 words": (Encoder, [torch.arange(16)[None]]),
    "encoder, 32 × 64 words": (Encoder, [torch.arange(2048).reshape(32, 64)]),
    "linear 2048², 1 row": (lambda: nn.Sequential(nn.Linear(2048, 2048)), [torch.ones(1, 2048)]),
    "linear 2048², 64 rows": (lambda: nn.Sequential(nn.Linear(2048, 2048)), [torch.ones(64, 2048)]),
    "convolutions, 1 × 14²": (convolutions, [torch.ones(1, 128, 14, 14)]),
    "convolutions, 8 × 14²": (convolutions, [torch.ones(8, 128, 14, 14)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    arguments = parser.parse_args()
    rows = []
    measured(lambda: nn.Sequential(nn.Linear(8, 8)), torch.ones(1, 8), OPTIONS["4 bits"])  # loads and compiles
    for network, (make, (batch,)) in NETWORKS.items():
        for name, transform in OPTIONS.items():
            rows.append({"network": network, "option": name, **measured(make, batch, transform)})
            print(rows[-1], flush=True)
    columns = {
        "network": "network",
        "option": "every layer in",
        "dense_mb": "dense MB",
        "held_mb": "packed MB",
        "memory_dense_mb": "process, dense MB",
        "memory_packed_mb": "process, packed MB",
        "time": "time ÷ dense",
        "difference": "largest difference",
    }
    table = markdown(rows, columns)
    write_results(Path(arguments.out), "packed", {"rows": rows}, table)
    print(table)


def compressed(make: Callable[[], nn.Module], batch: Tensor, transform: Transform) -> nn.Module:
    """A network with every layer in one option."""
    torch.manual_seed(0)
    dense, parts = make().eval(), []
    for part in survey(dense, [batch]).parts:
        stored = transform.encode(Weight(part.weight(dense), part.target))
        parts.append(CompressedPart(part=part, transform=transform, stored=stored))
    install_(dense, parts)
    attach(dense, Compression(parts=tuple(parts)))
    return dense


@torch.no_grad()
def measured(make: Callable[[], nn.Module], batch: Tensor, transform: Transform) -> dict[str, Any]:
    """Memory and time of a network, dense and packed."""
    empty = process_bytes()
    dense = compressed(make, batch, transform)
    packed = pack_(copy.deepcopy(dense))
    record = record_of(packed)
    assert record is not None
    arrays = sum(size_bytes(array) for item in record.parts for array in item.stored.values())
    held = total_bytes(packed) + arrays
    expected = dense(batch)
    difference = float((packed(batch) - expected).abs().max() / expected.abs().max())
    ratios = time_ratios(packed, dense, batch)
    both = process_bytes()
    size = total_bytes(dense)
    del dense
    alone = process_bytes()
    return {
        "dense_mb": size / 1e6,
        "held_mb": held / 1e6,
        "memory_dense_mb": (both - alone) / 1e6,
        "memory_packed_mb": (alone - empty) / 1e6,
        "difference": difference,
        **ratios,
    }


def process_bytes() -> int:
    """Resident memory of this process after free memory has been returned to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
