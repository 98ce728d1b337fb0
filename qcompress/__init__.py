"""Choose how to compress a PyTorch model by solving the choice as an optimisation problem.

    model + data ──measure──▶ Measurement ──formulate──▶ Problem ──solve──▶ Solution ──apply──▶ smaller model

`compress` runs all steps. Every intermediate value can be saved and loaded elsewhere.
"""

from formulations import Evaluation, PairTerms, Problem
from qcompress.compressed.apply import apply_
from qcompress.compressed.factored import fold_
from qcompress.compressed.file import compressed_size, load_compressed, save_compressed
from qcompress.compressed.folding import fold_batch_norms
from qcompress.compressed.packed import pack_
from qcompress.compression import Result, compress
from qcompress.engines.base import Engine, EngineInfo
from qcompress.engines.export import ExportedFile, export
from qcompress.engines.registry import engines
from qcompress.engines.verify import Verification, verify
from qcompress.formulation import formulate
from qcompress.kv_cache import memory_budget
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.latency import time_options
from qcompress.measuring.layerwise_fit import fit_in_turn_
from qcompress.measuring.measure import measure
from qcompress.measuring.pair_terms import PAIR_STRENGTH
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.measuring.true_loss import TrueLoss, mean_loss
from qcompress.model.opened import open_model
from qcompress.options import Options, gguf_types, integer_products, low_rank, prune_channels, prune_quantize
from qcompress.refinement import Refined, RefineStep, refine
from qcompress.report import Report
from qcompress.streaming.applying import apply
from qcompress.streaming.remeasuring import remeasure
from qcompress.structure.find import find_sets
from qcompress.training.finetune import FinetuneProgress, finetune
from qcompress.training.stable_rank import stable_rank
from qcompress.vocabulary import count_words, split_vocabulary_, vocabulary_blocks
from solvers import Solution, Solver, available, solve
from solvers.compare.runs import Comparison, Suite, compare
from solvers.pool import pool
from solvers.sweep import Sweep, sweep

__version__ = "0.1.0"

__all__ = [
    "PAIR_STRENGTH",
    "Comparison",
    "Engine",
    "EngineInfo",
    "EncodeProgress",
    "Evaluation",
    "ExportedFile",
    "FinetuneProgress",
    "MeasureProgress",
    "Measurement",
    "Options",
    "PairTerms",
    "Problem",
    "RefineStep",
    "Refined",
    "Report",
    "Result",
    "Solution",
    "Solver",
    "Suite",
    "Sweep",
    "TimingProgress",
    "TrueLoss",
    "Verification",
    "apply",
    "apply_",
    "available",
    "compare",
    "compress",
    "count_words",
    "engines",
    "export",
    "finetune",
    "fold_",
    "fold_batch_norms",
    "formulate",
    "gguf_types",
    "integer_products",
    "load_compressed",
    "low_rank",
    "mean_loss",
    "measure",
    "memory_budget",
    "open_model",
    "pool",
    "refine",
    "remeasure",
    "prune_quantize",
    "prune_channels",
    "find_sets",
    "fit_in_turn_",
    "compressed_size",
    "pack_",
    "save_compressed",
    "solve",
    "split_vocabulary_",
    "stable_rank",
    "sweep",
    "time_options",
    "verify",
    "vocabulary_blocks",
]
