"""How long ``import qcompress`` takes, against ``import torch`` alone: ``python -m benchmarks.import_time``.

The promise is at most 1.3 times torch plus 0.3 s. Each import is timed in a fresh interpreter, in turns, and the
least of several counts: the rest is noise of the machine.
"""

import argparse
import subprocess
import sys

FACTOR, ALLOWANCE_S = 1.3, 0.3


def seconds(module: str) -> float:
    """Time of one import in a fresh interpreter."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    return float(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    times = [(seconds("torch"), seconds("qcompress")) for _ in range(parser.parse_args().repeats)]
    torch_s, ours_s = (min(column) for column in zip(*times, strict=True))
    limit_s = FACTOR * torch_s + ALLOWANCE_S
    print("| import | seconds |\n|---|--:|")
    print(f"| torch | {torch_s:.2f} |\n| qcompress | {ours_s:.2f} |\n| allowed | {limit_s:.2f} |")
    return int(ours_s > limit_s)


if __name__ == "__main__":
    sys.exit(main())
