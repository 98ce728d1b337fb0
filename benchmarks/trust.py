"""Is the default ever worse than the simple choices? True losses on samples that nothing was calibrated on.

For every network of `benchmarks.trust_cases`, source and number of calibration samples, family of options and budget:
`compress` with its defaults against the additive choice, pair terms and the best uniform setting, all three measured on
the whole calibration set without a guard. The rule for defaults: never worse than 1.05 times the better of additive and
uniform.

    python -m benchmarks.trust --data FOLDER [--only 'resnet20/lossless/64/*' …] [--smollm2 FOLDER] [--list]

A cell is named model/source/samples/family; ``--only`` takes patterns of such names and ``--list`` prints them. Each
row is written when it is done and the measurements of the current cell are kept, so an interrupted run resumes. The
time of a cell is forecast from earlier cells and the time of one pass.
"""

import argparse
import contextlib
import fnmatch
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qcompress
from benchmarks import trust_drawn
from benchmarks.clock import processor_time
from benchmarks.tables import Rows, markdown, write_results
from benchmarks.trust_cases import CASES, DRAWN, IMAGES, Case
from formulations import Problem
from qcompress import low_rank, prune_quantize
from qcompress.proposals import uniform_settings
from solvers import judge, solve

RULE = 1.05
BITS = (2, 3, 4, 5, 6, 8)
FAMILIES = {
    "bits": prune_quantize(bits=BITS, sparsity=(0,)),
    "compensated": prune_quantize(bits=BITS, sparsity=(0,), compensated=True),
    "sparse": prune_quantize(bits=BITS, sparsity=(0, 0.5), compensated=True),
    "rank": low_rank(whitened=True),
    "joint": prune_quantize(bits=BITS, sparsity=(0,), compensated=True) + low_rank(whitened=True),
}
BUDGETS = {**dict.fromkeys(FAMILIES, ("bytes", (0.07, 0.035))), "rank": ("macs", (0.55, 0.4))}
"""Resource, and budgets as shares of the range from the smallest possible use to the original: about 4 and 3 bits."""

SIZES = (64, 256, 1024)
SOURCES = {
    **dict.fromkeys(CASES, tuple(IMAGES)),
    **dict.fromkeys(DRAWN, ("drawn",)),
    "minilm": ("sentences",),
    "efficientnet": ("pictures",),
    "smollm2": ("text",),
}
MOST = {**dict.fromkeys(DRAWN, trust_drawn.MOST), "efficientnet": 512, "smollm2": 256}
COLUMNS = {
    "model": "model",
    "source": "samples",
    "samples": "of them",
    "family": "options",
    "budget": "budget",
    "default": "default",
    "additive": "additive",
    "pairs": "pair terms",
    "uniform": "uniform",
    "ratio": "default / better of additive and uniform",
    "chosen": "taken",
}


def names() -> list[str]:
    """Names of all cells, those with the fewest samples first."""
    return [
        f"{model}/{source}/{samples}/{family}"
        for samples in SIZES
        for model in CASES
        for source in SOURCES[model]
        for family in FAMILIES
        if samples <= MOST.get(model, max(SIZES))
    ]


def uniform_choice(measurement: qcompress.Measurement, problem: Problem) -> np.ndarray | None:
    """The uniform setting within the budget with the smallest additive loss."""
    settings = [setting.choice for setting in uniform_settings(measurement, problem)]
    return min(settings, key=lambda choice: problem.cost[problem.flat(choice)].sum(), default=None)


def measured(case: Case, data: list[Any], family: str, place: Path) -> qcompress.Measurement:
    """Measure on all of the data, resuming what an earlier run left."""
    file = place / "whole.npz"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        qcompress.measure(
            case.model, data, FAMILIES[family], loss=case.loss, method=case.method, forward=case.forward,
            cache=place / "whole.part",
        ).save(file)  # fmt: skip
    return qcompress.Measurement.load(file)


def rows_of(
    case: Case, data: list[Any], unseen: list[Any], family: str, time_limit: float, place: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row for every budget."""
    whole = measured(case, data, family, place)

    def lost(smaller: nn.Module) -> float:
        return qcompress.mean_loss(case.model, smaller, unseen, loss=case.loss, forward=case.forward)

    resource, shares = BUDGETS[family]
    original = whole.original[resource]
    smallest = qcompress.formulate(whole, {resource: original}).minimum_usage()[resource]
    for share in shares:
        budget = {resource: float(np.floor(smallest + share * (original - smallest)))}
        row: dict[str, Any] = {"budget": f"{budget[resource] / original:.3f} of the {resource}", "share": share}
        for name, pairs in (("additive", False), ("pairs", True)):
            solution = solve(qcompress.formulate(whole, budget, pairs=pairs), time_limit=time_limit, seed=0)
            row[name] = lost(qcompress.apply(case.model, whole, solution))
        problem = qcompress.formulate(whole, budget)
        simple = uniform_choice(whole, problem)
        row["uniform"] = None if simple is None else lost(qcompress.apply(case.model, whole, judge(problem, simple)))
        result = qcompress.compress(
            case.model, data, budget=budget, options=FAMILIES[family], time_limit=time_limit, folder=place / "run",
            loss=case.loss, method=case.method, forward=case.forward,
        )  # fmt: skip
        row["default"], row["chosen"] = lost(result.model), result.report.chosen
        row["predicted"], row["kept_aside"] = result.report.loss_predicted, result.report.loss_validation
        row["ratio"] = row["default"] / min(row[rival] for rival in ("additive", "uniform") if row[rival] is not None)
        yield row


def pass_s(case: Case, data: list[Any]) -> float:
    """Seconds of one forward pass over all of the data."""
    start = time.perf_counter()
    with torch.no_grad():
        case.model(**data[0]) if isinstance(data[0], dict) else case.model(data[0])
    return (time.perf_counter() - start) * len(data)


def forecast(rows: Rows, family: str, model: str, seconds: float) -> str:
    """State how long a cell will take, from the number of passes in earlier cells of its family."""
    of_family = [row for row in rows.of(family=family) if row.get("passes")]
    alike = [row for row in of_family if row["model"] == model] or of_family
    if not alike:
        return f"one pass takes {seconds:.1f} s; no earlier cell tells how many it takes"
    return f"about {np.median([row['passes'] for row in alike]) * seconds:.0f} s"


def table_of(values: list[dict[str, Any]]) -> str:
    """The table of the rows, with a summary."""
    ratios = np.array([row["ratio"] for row in values])
    gains = np.array([row["pairs"] / row["additive"] for row in values])
    return markdown(values, COLUMNS) + (
        f"\n\n{len(values)} cells: the default is worse than {RULE:g} × the better of additive and uniform in "
        f"{int((ratios > RULE).sum())}, at most {ratios.max():.3g} ×; geometric mean "
        f"{np.exp(np.log(ratios).mean()):.3g}. "
        f"Pair terms alone against additive: geometric mean {np.exp(np.log(gains).mean()):.3g}, "
        f"from {gains.min():.3g} to {gains.max():.3g}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--only", nargs="+", default=("*",), help="patterns of names of cells")
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M in Hugging Face's form")
    parser.add_argument("--time-limit", type=float, default=10, help="seconds for each solve")
    parser.add_argument("--processor-time", action="store_true", help="count processor time instead of the clock's")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and end")
    words = parser.parse_args()
    with processor_time(cores=torch.get_num_threads()) if words.processor_time else contextlib.nullcontext():
        run(words)


def run(words: argparse.Namespace) -> None:
    """Run the chosen cells and write the table."""
    chosen = [name for name in names() if any(fnmatch.fnmatchcase(name, pattern) for pattern in words.only)]
    if words.list or not chosen:
        print(*chosen, sep="\n")
        return
    out = Path(words.out)
    rows = Rows(out / "trust.json", {"time_limit": words.time_limit})
    known: tuple[str, Case] | None = None
    for name in chosen:
        model, source, samples, family = name.split("/")
        cell = {"model": model, "source": source, "samples": int(samples), "family": family}
        done = {row["share"] for row in rows.of(**cell)}
        if len(done) == len(BUDGETS[family][1]):
            continue
        if known is None or known[0] != model:
            known = model, CASES[model](words)
        case = known[1]
        data, place = case.calibration(source, int(samples)), out / "trust_cells" / name.replace("/", "-")
        seconds, start = pass_s(case, data), time.perf_counter()
        print(f"{name}: {forecast(rows, family, model, seconds)}", flush=True)
        for row in rows_of(case, data, case.unseen(source), family, words.time_limit, place):
            if row["share"] not in done:
                taken_s = time.perf_counter() - start
                rows.add({**cell, **row, "wall_s": taken_s, "passes": taken_s / max(seconds, 1e-3)})
        shutil.rmtree(place)
    table = table_of(rows.of())
    write_results(out, "trust", rows.values, table)
    print(table)


if __name__ == "__main__":
    main()
