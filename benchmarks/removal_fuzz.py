"""Random networks with coupled channels, pruned at random: smaller against masked network, real against predicted use.

python -m benchmarks.removal_fuzz [--networks 1000] [--first 0]
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tables import markdown, write_results
from qcompress.compressed.removal import mask_, remove_
from qcompress.model.counting import count
from qcompress.model.tensors import total_bytes
from qcompress.structure.find import find_sets
from qcompress.structure.uses import uses_of
from tests.structure.random_channels import random_network

SAME = 1e-4  # relative: float32 sums of other lengths round otherwise
COLUMNS = {
    "networks": "networks",
    "sets": "coupled sets",
    "units": "units",
    "removed": "removed",
    "outputs": "outputs other than masked",
    "uses": "bytes or macs other than predicted",
    "largest": "largest difference",
}


def tried(seed: int) -> dict[str, Any]:
    network, rng = random_network(seed), np.random.default_rng(seed)
    data = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    sets = find_sets(network, [data]).sets
    removed = {item.name: rng.choice(item.num_units, rng.integers(item.num_units), replace=False) for item in sets}
    kept = [item.num_units - len(removed[item.name]) for item in sets]
    uses = uses_of(network, sets, count(network, [data], None)).of(kept)
    masked, smaller = (change(copy.deepcopy(network), sets, removed) for change in (mask_, remove_))
    with torch.no_grad():
        expected, outputs = masked(data), smaller(data)
    difference = float((expected - outputs).abs().max() / expected.abs().max())
    macs = count(smaller, [data], None).macs
    return {
        "sets": len(sets),
        "units": sum(item.num_units for item in sets),
        "removed": sum(map(len, removed.values())),
        "largest": difference,
        "outputs": difference > SAME,
        "uses": uses["bytes"] != total_bytes(smaller) or abs(uses["macs"] - macs) > 1e-9 * macs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.first, arguments.first + arguments.networks):
        rows.append(tried(seed))
        if rows[-1]["outputs"] or rows[-1]["uses"]:
            print(f"seed {seed}: {rows[-1]}", flush=True)
    summary: dict[str, Any] = {name: sum(row[name] for row in rows) for name in rows[0]}
    summary |= {"networks": len(rows), "largest": max(row["largest"] for row in rows)}
    table = markdown([summary], COLUMNS)
    write_results(Path(arguments.out), f"removal_fuzz_{arguments.first}", rows, table)
    print(table)


if __name__ == "__main__":
    main()
