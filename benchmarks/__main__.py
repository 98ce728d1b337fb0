"""Run the benchmarks that need no long time, and bring the tables of the documentation up to date, in 20 minutes.

    python -m benchmarks [--data FOLDER] [--minutes 20]

Each benchmark runs as a process of its own, as long as the minutes last; one that is cut says so. A table of the
documentation whose benchmark ran to its end, with the command that the table names, gets the new rows
(``benchmarks/published``); then every table is written anew from its rows. The others take longer or need data: they
are listed with the command that makes them, after which `python -m benchmarks.pages --publish FILE` takes them over.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import pages
from formulations.files import read_json

ALONE = (
    "import_time",
    "solvers_exact",
    "solvers_quick",
    "presolve",
    "qubo",
    "time_to_target",
    "leap_forms",
    "solvers_more",
)
"""Benchmarks that need nothing but this checkout; those with a table come first."""

WITH_DATA = ("hawq_resnet18", "networks", "prediction", "cifar10_resnet20", "filters_resnet")

RESULTS = Path("benchmarks/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the models and data; without it those that need it are left out")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which nothing is run any more")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    runs = [(name, []) for name in ALONE]
    if arguments.data is not None:
        runs += [(name, ["--data", arguments.data]) for name in WITH_DATA]
    begun = time.time()
    outcomes = {name: run(name, words, end - time.monotonic()) for name, words in runs}
    fresh = [name for name, outcome in outcomes.items() if outcome == "done" and publish(name, begun)]
    pages.write_pages()
    print("\n== outcome")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}{', its table is new' if name in fresh else ''}")
    if arguments.data is None:
        print(f"left out, for want of --data FOLDER: {', '.join(WITH_DATA)}")
    print("Tables written from the rows of earlier runs; their commands (FOLDER and FILE are data):")
    for name, command in commands().items():
        if name not in fresh:
            print(f"  {name}: {command}")
    if failed := [name for name, outcome in outcomes.items() if outcome == "failed"]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(name: str, words: list[str], seconds: float) -> str:
    """Run a benchmark for at most so many seconds: done, failed, cut, or not begun."""
    if seconds <= 0:
        return "not begun, the time was over"
    print(f"\n== {name}", flush=True)
    begun = time.monotonic()
    try:
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *words], check=False, timeout=seconds)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"cut after {time.monotonic() - begun:.0f} s, the time was over"
    print(f"({time.monotonic() - begun:.0f} s)")
    return "failed" if status.returncode else "done"


def publish(name: str, begun: float) -> bool:
    """Take over the rows of a run, where a table shows them and names the command that was run."""
    file = RESULTS / f"{name}.json"
    known = commands()
    if name not in known or not file.exists() or file.stat().st_mtime < begun:
        return False
    if read_json(file, "rows of a benchmark").get("command") != known[name]:
        return False
    pages.publish(file)
    return True


def commands() -> dict[str, str]:
    """Published rows → the command that wrote them."""
    files = sorted(pages.PUBLISHED.glob("*.json"))
    return {file.stem: str(read_json(file, "rows of a benchmark")["command"]) for file in files}


if __name__ == "__main__":
    main()
