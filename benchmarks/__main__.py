"""All benchmarks that need no long time, one after the other: ``python -m benchmarks [--data FOLDER]``."""

import argparse
import subprocess
import sys

ALONE = (
    "import_time",
    "solvers_quick",
    "qubo",
    "solvers_exact",
    "presolve",
    "time_to_target",
    "leap_forms",
    "solvers_more",
)
WITH_DATA = ("hawq_resnet18", "networks", "prediction", "cifar10_resnet20", "filters_resnet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the models and data; without it those that need it are left out")
    arguments = parser.parse_args()
    failed = []
    for name in ALONE:
        failed += [name] * bool(_run(name, []))
    if arguments.data is None:
        print(f"left out, for want of --data FOLDER: {', '.join(WITH_DATA)}")
    else:
        for name in WITH_DATA:
            failed += [name] * bool(_run(name, ["--data", arguments.data]))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _run(name: str, arguments: list[str]) -> int:
    print(f"\n== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=False).returncode  # noqa: S603


if __name__ == "__main__":
    main()
