"""The instance library of this project: adds the instances that are missing.

    python -m benchmarks.library [--data FOLDER] [--library FOLDER]

Instances: two members of each kind of `benchmarks.kinds`; with ``--data`` the published ones in ``FOLDER/instances``
(only their records are stored); problems from real networks, whose files `qcompress formulate` writes into the
library's folder. ``qcompress instances improve benchmarks/instances`` solves them, ``verify`` recomputes all records.
"""

import argparse
from pathlib import Path

from benchmarks.kinds import KINDS, PREFIXES
from solvers.library import Library, Record

FOLDER = Path(__file__).parent / "instances"

ORIGINS = {
    "max-cut": "Gset, Helmberg and Rendl, doi:10.1137/S1052623497328987",
    "qubo": "BiqMac library, Wiegele 2007",
    "qkp": "Billionnet and Soutif, doi:10.1016/S0377-2217(03)00244-3",
    "mmkp": "Khan, Li, Manning, Akbar 2002, Studia Informatica Universalis 2(1)",
}
LITERATURE = {
    "maxcut_G1": -11624,
    "maxcut_G14": -3064,
    "maxcut_G32": -1410,
    "maxcut_G43": -6660,
    "qubo_be100.1": -19412,
    "qubo_be150.8.3": -29438,
    "qkp_jeu_100_100_1": -81978,
    "qkp_jeu_100_25_2": -56525,
    "qkp_jeu_200_25_5": -187324,
    "qkp_jeu_200_75_3": -61924,
    "qkp_jeu_300_50_4": -307124,
}
"""Best published objectives."""

SEEDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the models and data; its instances are added")
    parser.add_argument("--library", type=Path, default=FOLDER, help="folder of the records")
    arguments = parser.parse_args()
    library = Library(arguments.library, None if arguments.data is None else arguments.data / "instances")
    library.require_whole()
    add_missing(library)
    library.save()
    print(f"{len(library.records)} instances in {arguments.library}")


def add_missing(library: Library) -> None:
    """Add all kinds' members, the published instances at hand, and the problem files in the library's folder."""
    for kind, (family, arguments) in KINDS.items():
        for seed in range(SEEDS):
            name = f"{kind}, seed {seed}"
            if name not in library.records:
                origin = "drawn by formulations.generators.families"
                library.add(Record(name=name, origin=origin, family=family, arguments={**arguments, "seed": seed}))
    files = [] if library.published is None else sorted(library.published.glob("*.txt"))
    for file in files:
        reader = PREFIXES.get(file.name.split("_")[0])
        if reader is not None and file.stem not in library.records:
            record = Record(
                name=file.stem,
                origin=ORIGINS[reader],
                licence="its authors'",
                file=file.name,
                reader=reader,
                literature=LITERATURE.get(file.stem),
            )
            library.add(record)
    for file in sorted(library.folder.glob("*.npz")):
        if file.name != "choices.npz" and file.stem not in library.records:
            origin = "a real network, measured by this project"
            library.add(Record(name=file.stem, origin=origin, file=file.name, reader="problem"))


if __name__ == "__main__":
    main()
