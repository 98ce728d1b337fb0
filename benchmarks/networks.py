"""Real networks: how far from optimal, at most, are the choices for ResNet-20 and ResNet-56?

The layer-level problems of `qcompress.formulate` (2, 3, 4, 5, 6, 8 bits or keep; pair terms of full rank, measured by
`fisher` on 512 training images) at budgets from 2.5 to 6 bits on average. Per solve: what `auto` proves, and what the
dual bound alone would have proved about the same choice.

    python -m benchmarks.networks --data FOLDER [--time-limit 30] [--full-strength]
"""

import argparse
import time
from pathlib import Path

import qcompress
from benchmarks import cifar
from benchmarks.cifar10_resnet20 import BITS, bits_budget
from benchmarks.tables import markdown, write_results
from solvers import solve
from solvers.base import relative_gap
from solvers.bounds.duality import dual_bound

AVERAGE_BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the weights and images")
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 56), default=(20, 56), help="of the networks")
    parser.add_argument("--time-limit", type=float, help="seconds for each solve (default: 30 and 60 by depth)")
    parser.add_argument("--full-strength", action="store_true", help="pair terms as measured, not halved: harder")
    arguments = parser.parse_args()
    folder = cifar.data_folder(arguments)
    rows = []
    for depth in arguments.depth:
        model = cifar.resnet(depth, folder)
        calibration, _ = cifar.images(folder, "cifar10_train4k_jpegsource", 0, 512)
        options = qcompress.prune_quantize(bits=BITS, sparsity=(0,))
        measurement = qcompress.measure(model, cifar.batched(calibration), options)
        whole = qcompress.formulate(measurement, {"bytes": 1.0}, pairs=1.0 if arguments.full_strength else True)
        for average in AVERAGE_BITS:
            problem = whole.with_budgets(bytes=bits_budget(whole, average))
            limit = arguments.time_limit or (30 if depth == 20 else 60)
            begun = time.process_time()
            solution = solve(problem, "auto", time_limit=limit, seed=0)
            rows.append(
                {
                    "network": f"ResNet-{depth}",
                    "average_bits": average,
                    "objective": solution.objective,
                    "gap": solution.gap,
                    "dual_gap": relative_gap(solution.objective, dual_bound(problem).value),
                    "status": str(solution.status),
                    "wall_s": solution.wall_s,
                    "cpu_s": time.process_time() - begun,
                }
            )
            print(rows[-1], flush=True)
    columns = {
        "network": "network",
        "average_bits": "average bits",
        "objective": "objective (nats)",
        "dual_gap": "gap by the dual bound",
        "gap": "gap proven by auto",
        "status": "status",
        "wall_s": "wall s",
        "cpu_s": "processor s",
    }
    table = markdown(rows, columns)
    write_results(
        Path(arguments.out), "networks_full" if arguments.full_strength else "networks", {"rows": rows}, table
    )
    print(table)


if __name__ == "__main__":
    main()
