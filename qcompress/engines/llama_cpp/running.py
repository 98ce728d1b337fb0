"""Run a GGUF file with llama.cpp (the package ``xllamacpp``): next-token distributions, or sentence embeddings."""

import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompress.engines.base import EngineRun
from qcompress.engines.llama_cpp.architectures import architecture_called
from qcompress.engines.llama_cpp.container import opened, why_not_whole
from qcompress.errors import DataError, EngineError

QUIET = -1


def sequences(batch: Any) -> Iterator[list[int]]:
    """Yield the token ids of every sample of a batch, without padding.

    Args:
        batch: ``(samples, tokens)`` ids, alone, first in a tuple, or as ``input_ids`` of a dict with or without an
            ``attention_mask``.

    Raises:
        DataError: it contains no such ids.

    >>> list(sequences({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}))
    [[5, 6]]
    """
    words = batch
    mask = None
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        words, mask = batch.get("input_ids"), batch.get("attention_mask")
    elif isinstance(batch, (tuple, list)) and batch:
        words = batch[0]
    if not isinstance(words, Tensor) or words.ndim != 2 or words.is_floating_point():
        raise DataError("engine 'llama.cpp' takes token ids (samples, tokens), alone or as input_ids of a dict")
    for index, row in enumerate(words):
        kept = row if mask is None else row[mask[index].bool()]
        if not len(kept):
            raise DataError(f"sample {index} of a batch has no tokens: its attention_mask is all zero")
        yield kept.tolist()


def run(path: Path, batches: Iterable[Any], threads: int) -> EngineRun:
    """Log-probabilities ``(samples, tokens)`` of the next token of every sample, or embeddings ``(samples, width)``.

    Raises:
        EngineError: llama.cpp does not run the file.
    """
    lists = [list(sequences(batch)) for batch in batches]
    num_words, plain, encoder = _described(path)
    server = _server(path, lists, threads, embedding=encoder)
    outputs, wall_s = [], 0.0
    for batch in lists:
        rows = []
        for words in batch:
            start = time.perf_counter()
            row, seconds = _embedding(server, words) if encoder else _next_word(server, words, num_words, plain)
            wall_s += time.perf_counter() - start if seconds is None else seconds
            rows.append(row)
        outputs.append(torch.stack(rows))
    return EngineRun(outputs=tuple(outputs), wall_s=wall_s)


def _described(path: Path) -> tuple[int, int, bool]:
    """Return the size of the vocabulary, the id of a token of plain letters, and whether the model is an encoder.

    Raises:
        EngineError: the file is not a whole model, or has no tokenizer.
    """
    reader = opened(path)
    if why := why_not_whole(reader):
        raise EngineError(f"{path} {why}")
    kind = str(reader.fields["general.architecture"].contents())
    width = next(int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    encoder = architecture_called(kind).encoder
    if not encoder and "tokenizer.ggml.tokens" not in reader.fields:
        raise EngineError(f"{path} lacks tokenizer.ggml.tokens: give a file with the model's tokenizer")
    texts = () if encoder else reader.fields["tokenizer.ggml.tokens"].contents()
    plain = next((number for number, text in enumerate(texts) if text.isascii() and text.isalpha()), 0)
    return width, plain, encoder


def _next_word(server: Any, words: list[int], num_words: int, plain: int) -> tuple[Tensor, float | None]:
    """Return all log-probabilities; force the token ``plain``, so that no end or partial character is generated."""
    drawn = {"max_tokens": 1, "temperature": 0, "logit_bias": [[plain, 1e6]]}
    answer = server.handle_completions({"prompt": words, "logprobs": num_words, "cache_prompt": False, **drawn})
    if not isinstance(answer, dict) or not answer.get("choices"):
        raise EngineError(f"llama.cpp returned no next token: {answer}")
    table = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    row = torch.full((num_words,), float("nan"))
    row[[entry["id"] for entry in table]] = torch.tensor([entry["logprob"] for entry in table])
    return row, answer["timings"]["prompt_ms"] / 1000  # excludes the conversion of all tokens to text


def _embedding(server: Any, words: list[int]) -> tuple[Tensor, float | None]:
    answer = server.handle_embeddings({"input": [words]})
    if not isinstance(answer, dict) or not answer.get("data"):
        raise EngineError(f"llama.cpp returned no embedding: {answer}")
    return torch.tensor(answer["data"][0]["embedding"]), None


def _server(path: Path, batches: list[list[list[int]]], threads: int, *, embedding: bool) -> Any:
    import xllamacpp

    longest = max((len(words) for batch in batches for words in batch), default=0)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = longest + 8
    params.n_batch = params.n_ubatch = max(32, longest + 8)
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = QUIET
    params.warmup = False
    params.embedding = embedding
    try:
        return xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"llama.cpp does not load {path}: {_reason(path) or error}") from error


LOAD = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.verbosity, params.warmup, params.n_ctx = sys.argv[1], 1, False, 32
xllamacpp.Server(params)
"""


def _reason(path: Path) -> str:
    """Return what llama.cpp prints when it fails to load a file, found in another process; empty for nothing."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, check=False)  # noqa: S603
    lines = re.findall(r"error loading model: (.+)", done.stderr.decode(errors="replace"))
    return str(lines[0]).strip() if lines else ""
