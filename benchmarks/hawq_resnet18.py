"""The bit-width problems of HAWQ-V3 (arXiv 2011.10680) for ResNet-18, solved to their published optima.

Each layer gets 4 or 8 bits; the loss is the mean Hessian trace times the squared weight perturbation, summed; one limit
at a time on size, bit operations or latency, a quarter, half or three quarters of the way from all-4-bit to
all-8-bit. Layers whose outputs are added have one bit-width, so each such pair is one group.

    python -m benchmarks.hawq_resnet18 --data FOLDER
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.found import found
from formulations import Problem
from solvers import Status, solve

FILE = "hawq_resnet18.json"
SOLVERS = ("milp", "dp", "lagrangian", "auto")
SHARES = (0.25, 0.5, 0.75)
PUBLISHED = {
    "size": (0.118300, 0.074506, 0.033441),
    "bops": (0.460424, 0.215689, 0.079965),
    "latency": (0.460424, 0.202674, 0.079965),
}
"""Proven optima, by limit and share."""


def build(data: dict[str, Any]) -> Problem:
    """The problem without budgets: groups are layers or tied pairs, options 4 and 8 bits."""
    layers = range(data["layers"])
    first = {second: first for first, second in data["tied"]}
    group_of = [first.get(layer, layer) for layer in layers]
    groups = sorted(set(group_of))
    trace = np.array(data["mean_hessian_trace"])
    tables = {
        "cost": (trace * data["delta_weight_sq_4bit"], trace * data["delta_weight_sq_8bit"]),
        "size": (0.5 * np.array(data["size_8bit"]), np.array(data["size_8bit"])),
        "bops": (np.array(data["bops_32bit"]) / 64, np.array(data["bops_32bit"]) / 16),
        "latency": (np.array(data["latency_4bit"]), np.array(data["latency_8bit"])),
    }
    summed = {
        name: np.array([[bits[layer] for bits in columns] for layer in layers]) for name, columns in tables.items()
    }
    flat = {
        name: np.array([table[[layer for layer in layers if group_of[layer] == g]].sum(axis=0) for g in groups]).ravel()
        for name, table in summed.items()
    }
    cost = flat.pop("cost")
    return Problem([f"layer{g}" for g in groups], [["4 bits", "8 bits"]] * len(groups), cost, flat, {})


def with_limit(problem: Problem, resource: str, share: float) -> Problem:
    """The problem with the budget ``share`` of the way from all-4-bit to all-8-bit."""
    all4, all8 = (problem.resources[resource][bits::2].sum() for bits in (0, 1))
    return problem.with_budgets(**{resource: float(all4 + share * (all8 - all4))})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {FILE}")
    path = parser.parse_args().data / FILE
    if not path.is_file():
        print(f"no file {path}: --data must name the folder that holds {FILE}", file=sys.stderr)
        return 2
    problem = build(json.loads(path.read_text()))
    print(f"{'limit':8} {'share':>5} {'published':>10}  " + "  ".join(f"{name:>22}" for name in SOLVERS))
    wrong = 0
    for resource, optima in PUBLISHED.items():
        for share, optimum in zip(SHARES, optima, strict=True):
            limited = with_limit(problem, resource, share)
            cells = []
            for name in SOLVERS:
                solution = solve(limited, name)
                objective = found(solution).objective
                agrees = f"{objective:.6f}" == f"{optimum:.6f}" and solution.status is Status.OPTIMAL
                wrong += not agrees
                cells.append(
                    f"{objective:.6f} {solution.status} {1e3 * solution.wall_s:4.0f}ms{'' if agrees else ' !'}"
                )
            print(f"{resource:8} {share:5} {optimum:10.6f}  " + "  ".join(f"{cell:>22}" for cell in cells))
    print("all agree, all proven" if not wrong else f"{wrong} answers differ or are not proven")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
