"""Write the tables of the documentation and the README from the rows that the benchmarks wrote.

    python -m benchmarks.pages                                    rewrite every table between its markers
    python -m benchmarks.pages --publish benchmarks/results/trust.json   copy the rows of a run, then do that

Between ``<!-- table NAME -->`` and ``<!-- end of table -->`` is a table that `VIEWS` derives from the rows
in ``benchmarks/published/``, with the command that produced them. It is never edited by hand; a test compares the two.
The pictures (`benchmarks.pictures`) are drawn anew as well.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from benchmarks import pictures
from formulations.files import read_json, replacing, write_json

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "benchmarks" / "published"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
MISSING = "–"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How rows become a table.

    Attributes:
        columns: heading → format of a cell, such as ``"{kl:.3f}"``.
        across: a key whose values become columns of their own, in the order of the rows; ``cell`` is their format.
            The rows that agree in ``columns`` then make one row of the table.
        source: name of the file in ``benchmarks/published/``, if it differs from the table's.
        where: key → value that the rows must have.
    """

    columns: Mapping[str, str]
    across: str = ""
    cell: str = ""
    source: str = ""
    where: Row | None = None

    def table(self, rows: Iterable[Row]) -> str:
        """The rows as Markdown."""
        wanted = self.where or {}
        kept = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        values = list(dict.fromkeys(row[self.across] for row in kept)) if self.across else []
        lines: dict[tuple[str, ...], dict[Any, str]] = {}
        for number, row in enumerate(kept):
            head = tuple(filled(text, row) for text in self.columns.values())
            cells = lines.setdefault(head if self.across else (*head, str(number)), {})
            if self.across:
                cells[row[self.across]] = filled(self.cell, row)
        width = len(self.columns)
        body = [[*head[:width], *(cells.get(value, MISSING) for value in values)] for head, cells in lines.items()]
        headings = [*self.columns, *(f"{value:g}" if isinstance(value, float) else str(value) for value in values)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *body))

    def keys(self) -> set[str]:
        """The keys of rows that the table shows."""
        formats = "".join((*self.columns.values(), self.cell))
        names = {name for _, name, _, _ in Formatter().parse(formats) if name}
        return names | set(self.where or ()) | ({self.across} if self.across else set())


def filled(text: str, row: Row) -> str:
    """A format with the row's values; a dash where one is missing.

    >>> filled("{kl:.2f} ({accuracy:.1f})", {"kl": 0.123, "accuracy": 80.0}), filled("{gap:.1%}", {"gap": None})
    ('0.12 (80.0)', '–')
    """
    names = [name for _, name, _, _ in Formatter().parse(text) if name]
    return MISSING if any(row.get(name) is None for name in names) else text.format(**row)


CHOSEN = "{kl:.2f} → {kl_tuned:.2f} ({accuracy_tuned:.1f})"
NETWORKS = (
    ("resnet20", "accuracy", "{quality:.2f}", "KL", 32),
    ("efficientnet", "accuracy", "{quality:.2f}", "KL", 8),
    ("minilm", "Spearman", "{quality:.2f}", "squared difference", 32),
    ("smollm2", "next words right, %", "{quality:.2f}", "KL", 4),
)
CHANNELS = {
    "macs asked for": "{share:g}",
    "chosen by": "{choice}",
    "macs": "{macs:.3f}",
    "time": "{time:.2f}",
    "KL": "{kl:.2f}",
    "accuracy": "{accuracy:.1f}",
    "with batch norm taken again": "{renormed:.1f}",
}

VIEWS = {
    "streaming": View(
        columns={
            "GB on disk": "{gb:.2f}",
            "largest resident GB": "{peak_gb:.2f}",
            "largest address space GB": "{address_gb:.2f}",
            "measuring, s": "{measure_s:.0f}",
            "applying, s": "{apply_s:.0f}",
            "writing, s": "{export_s:.0f}",
            "comparing, s": "{verify_s:.0f}",
            "GB written": "{file_gb:.3f}",
            "outputs differ by": "{max_difference:g}",
        }
    ),
    "streaming_killed": View(
        columns={
            "GB on disk": "{gb:.2f}",
            "largest resident GB": "{peak_gb:.2f}",
            "measuring, s": "{measure_s:.0f}",
            "applying, s": "{apply_s:.0f}",
            "writing, s": "{export_s:.1f}",
            "comparing, s": "{verify_s:.0f}",
            "kills": "{kills}",
            "in runs": "{runs}",
            "that gave the same bytes": "{same}",
        }
    ),
    "scoring": View(
        columns={
            "step": "{step}",
            "options": "{options}",
            "CPU-s": "{s:.0f}",
            "of a pass": "{ratio:.2f}",
            "CPU-s per option": "{per_option:.1f}",
            "working out the options, CPU-s": "{encode_s:.0f}",
            "largest resident GB": "{peak_gb:.2f}",
            "model GB": "{model_gb:.2f}",
        }
    ),
    "measure_versions": View(
        columns={
            "network": "{network}",
            "before, CPU-s": "{before_s:.1f}",
            "now, CPU-s": "{now_s:.1f}",
            "ratio": "{ratio:.2f}",
            "least": "{least:.2f}",
            "most": "{most:.2f}",
            "costs differ by": "{costs:.1%}",
        }
    ),
    **{
        f"truth_{name}": View(
            columns={
                "model": "{model}",
                "prediction": "{prediction}",
                "Spearman": "{spearman:.3f}",
                "predicted / true, median": "{ratio:.2f}",
                "single costs within 1 standard error": "{within_1:.0%}",
                "within 2": "{within_2:.0%}",
            }
        )
        for name in ("smollm2", "minilm")
    },
    "trust": View(
        columns={
            "model": "{model}",
            "samples": "{samples} {source}",
            "options": "{family}",
            "budget": "{budget}",
            "default": "{default:.3g}",
            "additive": "{additive:.3g}",
            "pair terms": "{pairs:.3g}",
            "uniform": "{uniform:.3g}",
            "default / better of additive and uniform": "{ratio:.2f}",
        }
    ),
    "smollm2_gguf": View(
        columns={
            "preset": "{preset}",
            "tensor bytes": "{tensor_bytes:,}",
            "KL of the preset": "{preset_kl:.4f}",
            "predicted KL": "{predicted:.4f}",
            "KL": "{kl:.4f}",
            "relative to the preset": "{ratio:.2f}",
        }
    ),
    "smollm2_gguf_compensated": View(
        columns={
            "preset": "{preset}",
            "tensor bytes": "{tensor_bytes:,}",
            "KL of the preset": "{preset_kl:.4f}",
            "predicted KL": "{predicted:.4f}",
            "KL": "{kl:.4f}",
            "relative to the preset": "{ratio:.2f}",
            "gap": "{gap:.2%}",
            "seconds of ggml's encoders": "{ggml_s:.0f}",
            "seconds of llama-quantize": "{llama_quantize_s:.0f}",
        }
    ),
    "smollm2_pairs": View(
        columns={
            "bits a weight": "{asked:g}",
            "choice": "{choice}",
            "predicted KL": "{predicted:.4f}",
            "KL": "{kl:.4f}",
            "below the additive choice by": "{lower_by:.4f} ± {error:.4f}",
        }
    ),
    "smollm2_pairs_halves": View(
        columns={
            "option of both layers": "{option}",
            "pairs of layers": "{pairs}",
            "number": "{number:,}",
            "spread of correlations": "{spread:.3f}",
            "by chance": "{by_chance:.3f}",
            "two halves of the windows agree": "{halves_agree:.2f}",
        }
    ),
    "smollm2_hf_compensated": View(
        columns={
            "bits a weight asked for": "{asked:g}",
            "choice": "{choice}",
            "bits a weight": "{bits:.3f}",
            "bytes of the folder": "{file_bytes:,}",
            "predicted KL": "{predicted:.4f}",
            "gap": "{gap:.2%}",
            "KL": "{kl:.4f}",
            "above compress by": "{above:.4f} ± {error:.4f}",
            "logits differ by": "{difference:g}",
        }
    ),
    **{
        f"onnx_{network}": View(
            columns={
                "file": "{file}",
                "bytes": "{bytes:,}",
                quality: cell,
                loss: "{loss:.3g}",
                "ms per sample, batch 1": "{ms1:.2f}",
                "times as fast": "{faster1:.2f}",
                f"times as fast, batch {many}": f"{{faster{many}:.2f}}",
            }
        )
        for network, quality, cell, loss, many in NETWORKS
    },
    **{
        f"onnx_{network}_against": View(
            columns={
                "file": "{file}",
                "ms": "{ms1:.2f}",
                quality: cell,
                loss: "{loss:.3g}",
                "least loss in its time": "{least_loss}",
                "its ms": "{least_loss_ms:.2f}",
                f"its {quality}": cell.replace("quality", "least_loss_quality"),
                f"its {loss}": "{least_loss_loss:.3g}",
                "fastest that is as good": "{as_good}",
                "its time, ms": "{as_good_ms:.2f}",
            }
        )
        for network, quality, cell, loss, _ in NETWORKS
    },
    "cifar10_resnet20": View(
        columns={"average bits": "{average_bits:g}", "options": "{options}", "measured by": "{method}"},
        across="choice",
        cell="{accuracy:.1f} ({kl:.3f})",
    ),
    "compensation_resnet20": View(columns={"stored as": "{stored}"}, across="way", cell="{accuracy:.1f} ({kl:.4g})"),
    "woodfisher_resnet20": View(
        columns={"calibrated on": "{source}", "method": "{method}", "sparsities": "{ranking}"},
        across="sparsity",
        cell="{accuracy:.1f} ({kl:.2f}; {kl_lossless:.2f})",
        where={"table": "sparsity"},
    ),
    "woodfisher_resnet20_damping": View(
        columns={
            "calibrated on": "{source}",
            "damping": "{damping:.0e}",
            "relative to the mean of the diagonal": "{share:.1e}",
        },
        across="method",
        cell="{accuracy:.1f} ({kl:.2f}; {kl_lossless:.2f})",
        source="woodfisher_resnet20",
        where={"table": "damping"},
    ),
    **dict.fromkeys(
        ("prediction", "prediction_independent"),
        View(
            columns={"measured by": "{method}", "forward passes": "{forward_passes:.0f}"},
            across="prediction",
            cell="{spearman:.3f}",
        ),
    ),
    "ranks_resnet20": View(
        columns={"chosen by": "{choice}"}, across="budget", cell=CHOSEN, source="ranks_resnet20_whitened"
    ),
    "ranks_resnet56": View(
        columns={"chosen by": "{choice}"}, across="budget", cell=CHOSEN, source="ranks_resnet56_whitened"
    ),
    "filters_resnet20": View(
        columns={
            "scores": "{scores}",
            "bits' size": "{average_bits:g}",
            "solver": "{solver}",
            "optimum found": "{optimal}",
            "median above the optimum": "{median}",
            "worst": "{worst}",
            "CPU s to the optimum": "{tts_1:.3g}",
            "CPU s to 0.1 %": "{tts_2:.3g}",
            "CPU s of a run": "{cpu_s:.3g}",
        }
    ),
    "channels_resnet20": View(columns=CHANNELS),
    "channels_resnet56": View(columns={**CHANNELS, "fine-tuned": "{tuned:.1f}"}),
    "channels_efficientnet": View(columns={**CHANNELS, "fine-tuned": "{tuned:.1f}"}),
    "heads_minilm": View(
        columns={
            "time asked for": "{share:g}",
            "chosen by": "{choice}",
            "time": "{time:.2f}",
            "bytes": "{bytes:.2f}",
            "heads by block": "{heads}",
            "MLP units by block": "{units}",
            "blocks left out": "{left_out}",
            "Spearman × 100": "{spearman:.1f}",
            "after all layers are fitted": "{spearman_fitted:.1f}",
        }
    ),
    "jointly_resnet20": View(
        columns={
            "macs allowed": "{macs_share:g}",
            "bytes allowed": "{bytes_share:g}",
            "chosen": "{choice}",
            "macs": "{macs:.3f}",
            "bytes": "{bytes:,}",
            "KL": "{kl:.3f}",
            "accuracy": "{accuracy:.1f}",
        }
    ),
    "latency_resnet20": View(
        columns={
            "chosen by": "{choice}",
            "macs": "{macs:.2f}",
            "time, predicted": "{predicted_time:.2f}",
            "time, measured": "{time:.2f}",
            "KL": "{kl:.2f}",
            "accuracy": "{accuracy:.1f}",
        }
    ),
    "joint_resnet20": View(columns={"average bits": "{bits:g}"}, across="choice", cell="{kl:.3f} ({accuracy:.1f})"),
    "tail": View(
        columns={
            "average bits": "{bits:g}",
            "draw": "{draw}",
            "chosen by": "{loss}",
            "changed in the tail": "{tail}",
            "changed where ResNet-56 disagrees": "{disagreed}",
            "changed elsewhere": "{head}",
            "accuracy": "{accuracy:.1f}",
            "KL": "{kl:.3f}",
        }
    ),
    "minilm_sts": View(columns={"share of the bytes": "{budget}"}, across="choice", cell="{spearman:.2f}"),
    "solvers_exact": View(
        columns={
            "structure": "{structure}",
            "groups": "{groups:,}",
            "solver": "{solver}",
            "time": "{wall_s:.2f} s",
            "gap": "{gap_percent:.2g} %",
            "status": "{status}",
        }
    ),
    "networks": View(
        columns={
            "network": "{network}",
            "average bits": "{average_bits:g}",
            "gap by the dual bound alone": "{dual_gap:.2%}",
            "gap proven by `auto`": "{gap:.2%}",
            "time": "{wall_s:.1f} s",
        }
    ),
    "library": View(
        columns={
            "instance": "{kind}",
            "best": "{best:.6g}",
            **{
                f"`{solver}` above it": f"{{{solver}:.3f}} %"
                for solver in ("auto", "anneal", "lagrangian", "milp", "ga")
            },
            "`auto` says": "{status}",
        }
    ),
    "anneal_versions": View(
        columns={
            "problem": "{problem}",
            "version": "{version}",
            "median above the best": "{median:.2f} %",
            "worst": "{worst:.2f} %",
        }
    ),
}


def block(name: str) -> str:
    """The text between the markers of a table: its command and its rows."""
    view = VIEWS[name]
    values = read_json(PUBLISHED / f"{view.source or name}.json", "rows of a benchmark")
    return f"\n`{values['command']}`\n\n{view.table(values['rows'])}\n\n"


def with_tables(text: str) -> str:
    """The text of a page with every table written anew."""
    return TABLE.sub(lambda match: f"{match[1]}{block(match[2])}{match[3]}", text)


def publish(file: Path) -> None:
    """Copy the command and the columns that the tables show from a benchmark's file to ``benchmarks/published/``."""
    views = [view for name, view in VIEWS.items() if (view.source or name) == file.stem]
    if not views:
        raise SystemExit(f"no table shows {file.stem}; known: {', '.join(v.source or n for n, v in VIEWS.items())}")
    values, shown = read_json(file, "rows of a benchmark"), set().union(*(view.keys() for view in views))
    rows = [{key: value for key, value in row.items() if key in shown} for row in values["rows"]]
    PUBLISHED.mkdir(exist_ok=True)
    write_json(PUBLISHED / file.name, {"command": values["command"], "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", type=Path, nargs="+", default=(), help="JSON files that benchmarks wrote")
    for file in parser.parse_args().publish:
        publish(file)
    write_pages()


def write_pages() -> None:
    """Write the tables of every page, and the pictures, anew."""
    new = {page: with_tables(page.read_text()) for page in PAGES}
    new |= {pictures.FOLDER / f"{name}.svg": pictures.drawn(name) for name in pictures.PICTURES}
    for path, text in new.items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                file.write(text.encode())
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
