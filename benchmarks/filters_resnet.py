"""Filters of ResNet-20 and ResNet-56 pruned, bits removed, as one QUBO (arXiv 2505.16332): who finds the optimum?

``H = L_p + β·L_q − γ·R`` with γ bisected to a size; the proven optimum comes from the counts
(`formulations.generators.filters.counts`). Against it: simulated annealing on the paper's QUBO (dwave-samplers, read
after read), and ``anneal``, ``ga`` and reinforcement learning (`benchmarks.policy_gradient`) on the same function as a
`Problem`, with several seeds each. Layers whose outputs are added share their prune variables. Then the accuracy of
what was found, applied; of the hard budget's optimum (``dp``); and, at equal bytes, of this project's own formulation.

Every run ends by its own count of reads, sweeps or generations, so that what is found does not depend on the
machine's load; times are CPU seconds. The time to target (`solvers.compare.time_to_target`) is that of the better of
two lengths of run.

    python -m benchmarks.filters_resnet --data FOLDER [--depth 20] [--seeds 5]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dimod
import numpy as np
import torch
from dwave.samplers import SimulatedAnnealingSampler

import qcompress
from benchmarks import cifar
from benchmarks.found import found
from benchmarks.tables import markdown, write_results
from formulations.generators.filters.counts import best_choice, filter_counts, fit_size
from formulations.generators.filters.qubo import FilterBqm, FilterProblem, filter_bqm, filter_problem
from formulations.generators.filters.tables import FilterChoice, FilterNetwork
from qcompress.filters import FilterTables, apply_filters, read_filters
from solvers import Solution, judge, solve
from solvers.compare.time_to_target import target_near, time_to_target
from solvers.solution import TracePoint

READS, SWEEPS = 10, 3000  # of simulated annealing on the QUBO
POLICY = "benchmarks.policy_gradient:PolicyGradient"
RUNS = {  # the longer run last
    "anneal": ("anneal:sweeps=10", "anneal:sweeps=100"),
    "ga": ("ga:generations=1", "ga:generations=5"),
    "policy gradient": (f"{POLICY}:steps=200", f"{POLICY}:steps=1000"),
}
TARGETS = (0.0, 1e-3)  # relative distance from the optimum
SEARCH_COLUMNS = {
    "depth": "ResNet",
    "scores": "scores",
    "average_bits": "bits' size",
    "variables": "bits of the QUBO",
    "solver": "solver",
    "optimal": "optimum found",
    "median": "median above optimum",
    "worst": "worst",
    "tts_1": "CPU s to optimum",
    "tts_2": "CPU s to 0.1 %",
    "cpu_s": "CPU s of a run",
}
ACCURACY_COLUMNS = {
    "depth": "ResNet",
    "scores": "scores",
    "average_bits": "bits' size",
    "choice": "choice",
    "bytes": "bytes",
    "pruned": "filters pruned",
    "mean_bits": "mean bits",
    "loss": "L_p + βL_q",
    "accuracy": "accuracy %",
    "renormed": "with batch norm re-estimated",
}


def tied_layers(model: cifar.ResNet) -> list[list[str]]:
    """Layers whose outputs are added: the second convolutions of each stage, and the stem in the first stage."""
    second = [name for name, _ in model.named_modules() if name.endswith("conv2")]
    stages = [[name for name in second if name.startswith(f"layer{stage}.")] for stage in (1, 2, 3)]
    return [["conv1", *stages[0]], *stages[1:]]


def budget_of(network: FilterNetwork, average_bits: float) -> int:
    """Bytes of the network with all filters kept and all layers at ``bits`` bits."""
    weights = sum(len(layer.scores) * layer.weights_per_filter for layer in network.layers)
    scales = sum(4 * len(layer.scores) for layer in network.layers)
    return network.fixed_bytes + scales + math.floor(weights * average_bits / 8)


def sample(encoded: FilterBqm, stated: FilterProblem, seed: int, optimum: float) -> Solution:
    """Simulated annealing on the QUBO, read after read, until the optimum or the last read."""
    sampler, beta, trace = SimulatedAnnealingSampler(), beta_range(encoded.bqm), []
    start, choice, least = time.perf_counter(), None, math.inf
    for read in range(READS):
        samples = sampler.sample(encoded.bqm, num_reads=1, num_sweeps=SWEEPS, beta_range=beta, seed=READS * seed + read)
        if samples.first.energy < least:
            choice, least = encoded.decode(samples.first.sample), samples.first.energy
            trace.append(TracePoint(time.perf_counter() - start, least, None))
        if least <= optimum:
            break
    assert choice is not None
    return replace(judge(stated.problem, stated.encode(choice), name="sa on the QUBO"), trace=tuple(trace))


def beta_range(bqm: dimod.BinaryQuadraticModel) -> tuple[float, float]:
    """Inverse temperatures, from accepting the largest flip half of the time to rejecting 3 % of the median bias."""
    vectors = bqm.to_numpy_vectors()
    strength = abs(vectors.linear_biases)
    smallest = 0.03 * float(np.median(strength))
    for side in (vectors.quadratic.row_indices, vectors.quadratic.col_indices):
        strength = strength + np.bincount(side, abs(vectors.quadratic.biases), minlength=len(strength))
    return math.log(2) / float(strength.max()), math.log(100) / smallest


def in_cpu_seconds(run: Callable[[int], Solution], seed: int) -> Solution:
    """A run with times in CPU seconds: wall times multiplied by the run's CPU seconds per second of wall time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    solution = run(seed)
    cpu_s = time.process_time() - start_cpu
    ratio = cpu_s / (time.perf_counter() - start)
    trace = tuple(point._replace(t_s=point.t_s * ratio) for point in solution.trace)
    return replace(solution, wall_s=cpu_s, trace=trace)


def row_of(name: str, lengths: Sequence[Sequence[Solution]], optimum: float) -> dict[str, Any]:
    """One row of the table of searches; the quality is that of the longer runs."""
    runs = lengths[-1]
    gaps = [max(0.0, (run.objective - optimum) / abs(optimum)) for run in runs if run.objective is not None]
    targets = [target_near(optimum, within) for within in TARGETS]
    times = [[time_to_target(runs_of_target, target).seconds for runs_of_target in lengths] for target in targets]
    return {
        "solver": name,
        "optimal": f"{time_to_target(runs, optimum).hits}/{len(runs)}",
        "median": f"{statistics.median(gaps):.3%}",
        "worst": f"{max(gaps):.3%}",
        "tts_1": min((t for t in times[0] if t is not None), default=None),
        "tts_2": min((t for t in times[1] if t is not None), default=None),
        "cpu_s": statistics.median(run.wall_s for run in runs),
    }


def search(network: FilterNetwork, budget: int, seeds: int) -> tuple[list[dict[str, Any]], dict[str, FilterChoice]]:
    """Run all solvers at the γ of a size: their rows, and their choices with the last seed."""
    gamma, _ = fit_size(network, budget)
    start = time.process_time()
    exact = best_choice(network, gamma)
    exact_s = time.process_time() - start
    optimum = network.evaluate(exact, gamma).objective
    encoded, stated = filter_bqm(network, gamma), filter_problem(network, gamma)

    def solved(solver: str) -> Callable[[int], Solution]:
        return lambda seed: solve(stated.problem, solver, seed=seed)

    rows = [{"solver": "counts (exact)", "optimal": "proven", "tts_1": exact_s, "tts_2": exact_s, "cpu_s": exact_s}]
    choices = {"γ, exact": exact}
    kinds = {"sa on the QUBO": [lambda seed: sample(encoded, stated, seed, optimum)]}
    for name, lengths in RUNS.items():
        solve(stated.problem, lengths[0])  # compiles
        kinds[name] = [solved(solver) for solver in lengths]
    for name, runs in kinds.items():
        runs_by_solver = [[in_cpu_seconds(run, seed) for seed in range(seeds)] for run in runs]
        rows.append(row_of(name, runs_by_solver, optimum))
        choices[f"γ, {name}"] = stated.decode(found(runs_by_solver[-1][-1]).choice)
    for row in rows:
        row["variables"] = encoded.bqm.num_variables
    counts = filter_counts(network, budget)
    choices["hard budget, exact"] = counts.decode(found(solve(counts.problem, "dp")).choice)
    return rows, choices


class Judge:
    """Accuracy on the test images, plain and with batch norm re-estimated, of choices and models."""

    def __init__(self, model: cifar.ResNet, calibration: list[torch.Tensor], folder: Path, test: int) -> None:
        self._model, self._calibration = model, calibration
        self._inputs, self._labels = cifar.images(folder, "cifar10_test_jpegsource", 0, test)
        self._seen: dict[bytes, tuple[float, float]] = {}

    def accuracy(self, model: torch.nn.Module) -> float:
        return cifar.accuracy(cifar.logits(model, self._inputs), self._labels)

    def applied(self, tables: FilterTables, choice: FilterChoice) -> dict[str, Any]:
        key = choice.bits.tobytes() + b"".join(pruned.tobytes() for pruned in choice.pruned)
        if key not in self._seen:
            plain = apply_filters(self._model, tables, choice)
            renormed = apply_filters(self._model, tables, choice, batch_norm_data=self._calibration)
            self._seen[key] = self.accuracy(plain), self.accuracy(renormed)
        worth = tables.network.evaluate(choice)
        return {
            "bytes": worth.size_bytes,
            "pruned": sum(int(pruned.sum()) for pruned in choice.pruned),
            "mean_bits": float(choice.bits.mean()),
            "loss": worth.objective,
            "accuracy": self._seen[key][0],
            "renormed": self._seen[key][1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=(20, 56), help="of the networks")
    parser.add_argument("--scores", nargs="+", choices=("l1", "fisher"), default=("l1", "fisher"))
    parser.add_argument("--average-bits", type=float, nargs="+", default=(4.0, 2.5), help="sizes")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the quantization term")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--test", type=int, default=2500, help="test images; 0 leaves the accuracy out")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    searches: list[dict[str, Any]] = []
    accuracies: list[dict[str, Any]] = []
    for depth in arguments.depth:
        model = cifar.resnet(depth, folder)
        calibration = cifar.batched(cifar.images(folder, "cifar10_train4k_jpegsource", 0, arguments.calibration)[0])
        judged = Judge(model, calibration, folder, arguments.test) if arguments.test else None
        measurement = None
        if judged is not None:
            accuracies.append({"depth": depth, "choice": "original", "accuracy": judged.accuracy(model)})
            options = qcompress.prune_quantize(bits=(2, 3, 4, 5, 6, 8), sparsity=(0,))
            measurement = qcompress.measure(model, calibration, options)
        for scores in arguments.scores:
            tables = read_filters(model, calibration, beta=arguments.beta, tied=tied_layers(model), scores=scores)
            for average_bits in arguments.average_bits:
                where = {"depth": depth, "scores": scores, "average_bits": average_bits}
                budget = budget_of(tables.network, average_bits)
                rows, choices = search(tables.network, budget, arguments.seeds)
                searches += [where | row for row in rows]
                print(markdown(searches[-len(rows) :], SEARCH_COLUMNS), flush=True)
                if judged is None or measurement is None:
                    continue
                for name, choice in choices.items():
                    accuracies.append(where | {"choice": name} | judged.applied(tables, choice))
                if scores == arguments.scores[0]:
                    solution = solve(qcompress.formulate(measurement, {"bytes": budget}), time_limit=10, seed=0)
                    ours = qcompress.apply(model, measurement, solution)
                    row = {"choice": "qcompress.formulate, bits only", "accuracy": judged.accuracy(ours)}
                    accuracies.append(where | {"scores": "–", "bytes": int(solution.usage["bytes"])} | row)
    table = markdown(searches, SEARCH_COLUMNS)
    if accuracies:
        table += "\n\n" + markdown(accuracies, ACCURACY_COLUMNS)
    name = "filters_resnet" + "_".join(map(str, arguments.depth))
    write_results(Path(arguments.out), name, {"rows": searches, "accuracies": accuracies}, table)
    print("\n" + table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
