"""Run the short benchmarks and update the tables of the documentation, within 20 minutes.

    python -m benchmarks [--data FOLDER] [--minutes 19]

Each benchmark runs in its own process until the time is over; interrupted ones are listed. Those with a table come
first and run with the command that the table names; if they complete, their rows are published
(``benchmarks/published``). Then all tables are written from the published rows. Benchmarks that take longer or need
data are listed with their commands; their results are published by `python -m benchmarks.pages --publish FILE`.
"""

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import pages
from formulations.files import read_json

WITH_DATA = ("hawq_resnet18", "networks", "prediction", "cifar10_resnet20")

ALONE = (
    "import_time",
    "solvers_exact",
    "presolve",
    "leap_forms",
    "solvers_more",
    "solvers_quick",
    "time_to_target",
    "qubo",
)
"""Benchmarks that need no data, the longest last."""

RESULTS = Path("benchmarks/results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the models and data; without it, benchmarks that need it are skipped")
    parser.add_argument("--minutes", type=float, default=19.0, help="time limit for all benchmarks together")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    names = [*([] if arguments.data is None else WITH_DATA), *ALONE]
    with_table = commands()
    runs = [(name, words_of(name, arguments.data)) for name in sorted(names, key=lambda name: name not in with_table)]
    begun = time.time()
    outcomes = {name: run(name, words, end - time.monotonic()) for name, words in runs}
    fresh = [name for name, outcome in outcomes.items() if outcome == "done" and publish(name, begun)]
    pages.write_pages()
    print("\n== outcome")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}{', its table is new' if name in fresh else ''}")
    if arguments.data is None:
        print(f"skipped, because they need --data FOLDER: {', '.join(WITH_DATA)}")
    print("Tables written from the rows of earlier runs, with their commands (FOLDER and FILE are data):")
    for name, command in commands().items():
        if name not in fresh:
            print(f"  {name}: {command}")
    if failed := [name for name, outcome in outcomes.items() if outcome == "failed"]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def words_of(name: str, data: str | None) -> list[str]:
    """Return the arguments of a benchmark: those that its table names, if it has one."""
    if name not in (known := commands()):
        return [] if name in ALONE else ["--data", str(data)]
    _, _, _, *words = known[name].split()
    named = [str(data) if flag == "--data" else word for flag, word in itertools.pairwise(["", *words])]
    if "--out" in named:
        place = named.index("--out")
        del named[place : place + 2]
    return [*named, "--out", str(RESULTS)]


def run(name: str, words: list[str], seconds: float) -> str:
    """Run a benchmark for at most ``seconds`` and return the outcome in words."""
    if seconds <= 0:
        return "not started: time limit"
    print(f"\n== {name}", flush=True)
    begun = time.monotonic()
    try:
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *words], check=False, timeout=seconds)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - begun:.0f} s: time limit"
    print(f"({time.monotonic() - begun:.0f} s)")
    return "failed" if status.returncode else "done"


def publish(name: str, begun: float) -> bool:
    """Publish the rows of a run if a table shows them and names the command that was run."""
    file = RESULTS / f"{name}.json"
    known = commands()
    if name not in known or not file.exists() or file.stat().st_mtime < begun:
        return False
    if read_json(file, "rows of a benchmark").get("command") != known[name].replace(" --out FOLDER", ""):
        return False
    pages.publish(file)
    return True


def commands() -> dict[str, str]:
    """Return the command of each published file."""
    files = sorted(pages.PUBLISHED.glob("*.json"))
    return {file.stem: str(read_json(file, "rows of a benchmark")["command"]) for file in files}


if __name__ == "__main__":
    main()
